"""A rank is killed, is stopped, or waits for a disk that does not answer, in each verb: the others raise, naming it.

At once where it was killed, else when the deadline has passed. (`tests/faults` has the phases of save and load.)
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

import shardckpt as sc
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.wrapping import Operation, StorageWrapper
from shardckpt.testing.gang_acts import await_marks, mark
from shardckpt.testing.pool import ProcessPool, RankLostError
from tests.faults.gangwork import RANKS, blank_state, make_state
from tests.faults.test_processes import LONG, NOTICED_S, loads, save, wake_when_all_have_raised
from tests.kills.test_kills import named
from tests.scorecard import Scorecard

T = TypeVar("T")

SHORT = timedelta(seconds=1.5)
CALL_S = 60.0


@dataclass(frozen=True)
class Hand:
    """One rank at work, and the place as it sees it."""

    checkpoints: sc.CheckpointManager
    storage: Storage
    rank: int

    def begin_to_save(self) -> None:
        self.checkpoints.save(3, make_state(self.rank, 3), replicated=("model",))


def wait_for_it(it: Hand) -> None:
    it.begin_to_save()
    it.checkpoints.wait()


def close_meanwhile(it: Hand) -> None:
    it.begin_to_save()
    it.checkpoints.close()


def repair_and_load(it: Hand) -> None:
    """Rank 0 rebuilds the record, which it loses here, while the others come to the load already."""
    if it.rank == 0:
        it.storage.delete(["step_2/manifest.json"])
        sc.repair(it.storage, step=2, apply=True)
    it.checkpoints.load(1, blank_state(it.rank))


@dataclass(frozen=True)
class Verb:
    """What is done, by which rank something happens then, and at which operation on which keys; which steps are there
    afterwards."""

    act: Callable[[Hand], object]
    victim: int
    operation: str
    key: str
    left: tuple[tuple[int, ...], ...] = ((1, 2),)


VERBS: dict[str, Verb] = {
    "save": Verb(lambda it: save(it.checkpoints, 3, make_state(it.rank, 3)), 1, "put", "step_3"),
    "load": Verb(lambda it: it.checkpoints.load(2, blank_state(it.rank)), 1, "read_into", "step_2"),
    "prune": Verb(lambda it: it.checkpoints.keep_last_n_checkpoints(1), 0, "delete_tree", "step_1", ((2,), (1, 2))),
    "wait": Verb(wait_for_it, 1, "put", "step_3"),
    "close": Verb(close_meanwhile, 2, "put", "step_3"),
    "repair": Verb(repair_and_load, 0, "replace", "step_2", ((1,), (1, 2))),
}


class Struck(StorageWrapper):
    """Something happens, once, before an operation."""

    armed = False

    def __init__(self, inner: Storage, verb: Verb, strike: Callable[[], None]) -> None:
        super().__init__(inner)
        self._verb, self._strike = verb, strike

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        verb = self._verb
        if self.armed and operation.name == verb.operation and any(verb.key in each for each in operation.keys):
            self.armed = False
            self._strike()
        return call()


def suffer(rank: int, size: int, folder: Path, place: Path, name: str, fault: str) -> dict[str, Any]:
    verb = VERBS[name]

    def strike() -> None:
        (place / "struck").write_text(str(time.monotonic()))  # of the machine, not of the process
        (place / "stopped").write_text(str(os.getpid()))
        if fault == "stalled":
            await_marks(place, "raised", size - 1)
        else:
            os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)

    storage = Struck(LocalStorage(place / "run"), verb, strike)
    gangs = sc.Gangs.from_env()
    checkpoints = sc.CheckpointManager(storage, gangs, timeout=LONG if fault == "killed" else SHORT)
    try:
        for step in (1, 2):
            save(checkpoints, step, make_state(rank, step))
        storage.armed = rank == verb.victim
        try:
            verb.act(Hand(checkpoints, storage, rank))
        except sc.CheckpointError as error:
            seen = {"text": str(error), "took_s": time.monotonic() - float((place / "struck").read_text())}
        else:
            seen = {"text": "nothing was wrong", "took_s": 0.0}
        if rank != verb.victim:
            mark(place, "raised", rank)
        return seen
    finally:
        try:
            checkpoints.close()
        finally:
            gangs.close()


def look(rank: int, size: int, folder: Path, root: Path) -> dict[int, bool]:
    gangs = sc.Gangs.from_env()
    try:
        with sc.CheckpointManager(root, gangs, timeout=LONG) as checkpoints:
            found = {step: loads(checkpoints, step, rank) for step in checkpoints.steps()}
            save(checkpoints, 4, make_state(rank, 4))
            return found
    finally:
        gangs.close()


@pytest.mark.crash
@pytest.mark.parametrize("fault", ["killed", "stopped", "stalled"])
@pytest.mark.parametrize("name", VERBS)
@pytest.mark.sampled(3)
def test_the_others_raise_in_time_and_name_it(
    ranks: ProcessPool, tmp_path: Path, scorecard: Scorecard, name: str, fault: str
) -> None:
    victim = VERBS[name].victim
    over = threading.Event()
    waker = threading.Thread(target=wake_when_all_have_raised, args=(tmp_path, over), name="waker")
    if fault == "stopped":
        waker.start()
    try:
        outcomes = ranks.run_settled(RANKS, suffer, tmp_path, name, fault, timeout=CALL_S)
    finally:
        over.set()
        if fault == "stopped":
            waker.join()
    limit_s = NOTICED_S + (0.0 if fault == "killed" else SHORT.total_seconds())
    promised_s, took = (2.0 if fault == "killed" else SHORT.total_seconds() + 2.0), []
    for rank, outcome in enumerate(outcomes):
        if rank == victim and fault == "killed":
            assert isinstance(outcome.error, RankLostError)
            continue
        assert outcome.error is None, str(outcome)
        if rank != victim:
            assert victim in named(outcome.value["text"]), outcome.value
            took.append(outcome.value["took_s"])
    note = f"{fault}: {sum(each > promised_s for each in took)} later than {promised_s:g} s"
    scorecard.add("a rank killed, stopped or on a stalled disk, by verb", runs=1, notes=note)
    assert max(took) < limit_s
    for found in ranks.run(RANKS, look, tmp_path / "run", timeout=CALL_S):
        assert found in [dict.fromkeys(steps, True) for steps in VERBS[name].left]
