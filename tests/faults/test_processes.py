"""Ranks as processes: one is killed or stopped in a phase of a save. Whole or absent, nobody hangs, all others know."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

import shardckpt as sc
from shardckpt.storage.base import Buffer, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.wrapping import Operation, StorageWrapper
from shardckpt.testing.gang_acts import await_marks, mark
from shardckpt.testing.pool import ProcessPool, RankLostError
from tests.faults.gangwork import RANKS, Trap, blank_state, make_state, same

T = TypeVar("T")

LONG = timedelta(seconds=60)
NOTICED_S = 10.0
"""A rank that is killed is noticed in milliseconds; this is for a busy machine, and well below `LONG`."""
SHORT = timedelta(seconds=3)
CALL_S, STOPPED_CALL_S = 75.0, 60.0

NOT_YET = "before the ranks meet"
"""In `state_dict`, on the training's thread. No conversation is open then: others wait for it until the deadline."""
IN_WRITE, WRITTEN, IN_RECORD, BEFORE_RENAME, AFTER_RENAME = "in write", "written", "in record", "before", "after rename"


class Struck(StorageWrapper):
    """This process is struck by a signal, once, at one place of the save of step 2."""

    def __init__(self, inner: Storage, phase: str, rank: int, strike: Callable[[], None]) -> None:
        super().__init__(inner)
        self._phase, self._key, self._signal = phase, f"rank_{rank}.pt", strike

    def _strike(self) -> None:
        self._phase = ""
        self._signal()

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        if not key.startswith("step_2"):
            return super().put(key, parts)
        due = {IN_WRITE: self._key, IN_RECORD: "manifest.json"}.get(self._phase)
        nbytes = super().put(key, self._halves(parts) if due and key.endswith(due) else parts)
        if self._phase == WRITTEN and key.endswith(self._key):
            self._strike()
        return nbytes

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        renames = operation.name == "rename_folder" and operation.keys[1] == "step_2"
        if renames and self._phase == BEFORE_RENAME:
            self._strike()
        result = call()
        if renames and self._phase == AFTER_RENAME:
            self._strike()
        return result

    def _halves(self, parts: Iterable[Buffer]) -> Iterator[Buffer]:
        for part in parts:
            view = memoryview(part)
            yield view[: len(view) // 2]
            self._strike()
            yield view[len(view) // 2 :]


def save(checkpoints: sc.CheckpointManager, step: int, state: dict[str, Any]) -> sc.CheckpointInfo:
    return checkpoints.save(step, state, replicated=("model",)).result()


def loads(checkpoints: sc.CheckpointManager, step: int, rank: int) -> bool:
    state = blank_state(rank)
    checkpoints.load(step, state)
    return same(state, make_state(rank, step))


def failure_of(checkpoints: sc.CheckpointManager, state: dict[str, Any]) -> dict[str, Any]:
    try:
        save(checkpoints, 2, state)
    except sc.CheckpointError as error:
        return {"kind": type(error), "text": str(error), "step": error.step, "at_s": time.monotonic()}
    return {"kind": None, "text": "it was saved"}


def save_and_die(rank: int, size: int, folder: Path, root: Path, phase: str, victim: int) -> dict[str, Any]:
    """Steps 1 and 2; the victim is killed in step 2. What the others saw, and how long after the kill."""
    timeout = SHORT if phase == NOT_YET else LONG

    def strike() -> None:
        (folder / "struck").write_text(str(time.monotonic()))  # of the machine, not of the process
        os.kill(os.getpid(), signal.SIGKILL)

    storage: Storage = LocalStorage(root)
    if rank == victim:
        storage = Struck(storage, phase, rank, strike)
    gangs = sc.Gangs.from_env()
    with (folder / f"stacks_{rank}").open("w+") as stacks:
        late = threading.Timer(2 * NOTICED_S, lambda: faulthandler.dump_traceback(stacks, all_threads=True))
        late.start()
        try:
            seen = save_twice(storage, gangs, rank, timeout, strike if rank == victim and phase == NOT_YET else None)
        finally:
            late.cancel()
            late.join()
            gangs.close()
        stacks.seek(0)
        seen["stacks when it was late"] = stacks.read()
    seen["took_s"] = seen.pop("at_s", 0.0) - float((folder / "struck").read_text())
    return seen


def save_twice(
    storage: Storage, gangs: sc.Gangs, rank: int, timeout: timedelta, strike: Callable[[], None] | None
) -> dict[str, Any]:
    with sc.CheckpointManager(storage, gangs, timeout=timeout) as checkpoints:
        save(checkpoints, 1, make_state(rank, 1))
        state = make_state(rank, 2)
        if strike is not None:
            state["deadly"] = Trap(strike)
        return failure_of(checkpoints, state)


def look_and_go_on(rank: int, size: int, folder: Path, root: Path) -> dict[str, Any]:
    """What a job that is started afterwards finds, and whether it can save the same step and the next."""
    gangs = sc.Gangs.from_env()
    try:
        with sc.CheckpointManager(root, gangs, timeout=LONG) as checkpoints:
            found = checkpoints.steps()
            loaded = [loads(checkpoints, step, rank) for step in found]
            for step in (2, 3):
                save(checkpoints, step, make_state(rank, step))
            after = {step: loads(checkpoints, step, rank) for step in checkpoints.steps()}
    finally:
        gangs.close()
    return {"found": found, "loaded": loaded, "after": after}


KILLS = [
    *[(IN_WRITE, victim) for victim in range(RANKS)],
    *[(WRITTEN, victim) for victim in (0, 1)],
    (NOT_YET, 2),
    *[(phase, 0) for phase in (IN_RECORD, BEFORE_RENAME, AFTER_RENAME)],
]


@pytest.mark.crash
@pytest.mark.parametrize(("phase", "victim"), KILLS)
@pytest.mark.sampled(2)
def test_a_rank_is_killed(ranks: ProcessPool, tmp_path: Path, phase: str, victim: int) -> None:
    outcomes = ranks.run_settled(RANKS, save_and_die, tmp_path, phase, victim, timeout=CALL_S)
    in_force = phase == AFTER_RENAME
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert isinstance(outcome.error, RankLostError)
            assert outcome.error.exitcode == -signal.SIGKILL
            continue
        assert outcome.error is None, str(outcome)
        seen = outcome.value
        assert seen["kind"] is not None, seen
        assert issubclass(seen["kind"], sc.CheckpointSaveError)
        assert seen["step"] == 2
        assert f"rank {victim}" in seen["text"]
        assert seen["took_s"] < NOTICED_S + (SHORT.total_seconds() if phase == NOT_YET else 0.0), seen
        if in_force:
            assert seen["kind"] is sc.CommitUnknownError
    steps = [1, 2] if in_force else [1]
    assert sorted(path.parent.name for path in tmp_path.glob("*/manifest.json") if path.parent.suffix == "") == [
        f"step_{step}" for step in steps
    ]
    for found in ranks.run(RANKS, look_and_go_on, tmp_path, timeout=CALL_S):
        assert found == {"found": steps, "loaded": [True] * len(steps), "after": {1: True, 2: True, 3: True}}


def save_and_stop(rank: int, size: int, folder: Path, root: Path, victim: int) -> dict[str, Any]:
    """The victim stops itself while it writes step 2; who started it all wakes it when the others have raised."""

    def strike() -> None:
        (folder / "struck").write_text(str(time.monotonic()))
        (root / "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    storage: Storage = LocalStorage(root / "run")
    if rank == victim:
        storage = Struck(storage, IN_WRITE, rank, strike)
    gangs = sc.Gangs.from_env()
    try:
        with sc.CheckpointManager(storage, gangs, timeout=SHORT) as checkpoints:
            save(checkpoints, 1, make_state(rank, 1))
            seen = failure_of(checkpoints, make_state(rank, 2))
            seen["took_s"] = seen.pop("at_s", 0.0) - float((folder / "struck").read_text())
            mark(root, "raised", rank)
            await_marks(root, "raised", size)  # with the victim, who has been woken by then
            seen["steps"] = checkpoints.steps()
            for step in (2, 3):
                save(checkpoints, step, make_state(rank, step))
            seen["after"] = {step: loads(checkpoints, step, rank) for step in checkpoints.steps()}
    finally:
        gangs.close()
    return seen


def wake_when_all_have_raised(place: Path, over: threading.Event) -> None:
    """In a thread of the test: the victim goes on as soon as the others have given up on it, and not before: a busy
    machine may take long until it has been stopped."""
    while not over.wait(0.005):
        if (place / "stopped").exists() and len(list(place.glob("raised_*"))) == RANKS - 1:
            break
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((place / "stopped").read_text()), signal.SIGCONT)


@pytest.mark.crash
@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_is_stopped_and_goes_on_later(ranks: ProcessPool, tmp_path: Path, victim: int) -> None:
    over = threading.Event()
    waker = threading.Thread(target=wake_when_all_have_raised, args=(tmp_path, over), name="waker")
    waker.start()
    try:
        outcomes = ranks.run_settled(RANKS, save_and_stop, tmp_path, victim, timeout=STOPPED_CALL_S)
    finally:
        over.set()
        waker.join()
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, str(outcome)
        seen = outcome.value
        assert seen["kind"] is sc.CheckpointSaveError, seen
        assert seen["steps"] == [1]
        assert seen["after"] == {1: True, 2: True, 3: True}
        if rank != victim:
            assert f"rank {victim}" in seen["text"]
            assert seen["took_s"] < SHORT.total_seconds() + NOTICED_S
