"""Phases of a load x ranks x {raises, hangs}: every rank raises and names it, no state changes, the next one works."""

from __future__ import annotations

import copy
import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import shardckpt as sc
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import Operation
from shardckpt.testing.faults import FailingStorage, GatedStorage, on
from shardckpt.testing.gangs import run_ranks
from tests.faults.gangwork import PATIENT, PLACES, RANKS, SHORT, at_once, blank_state, make_place, make_state, same


@dataclass
class Seen:
    """What one rank saw of the load that was to fail."""

    error: BaseException | None
    seconds: float
    unchanged: bool
    loads_again: bool


class Switch:
    """A predicate that holds, while it is on, for the n-th operation that matches and those after it."""

    def __init__(self, when: Callable[[Operation], bool], *, nth: int = 1) -> None:
        self._when, self._nth = when, nth
        self.on = threading.Event()

    def __call__(self, operation: Operation) -> bool:
        if not (self.on.is_set() and self._when(operation)):
            return False
        self._nth -= 1
        return self._nth <= 0


class Unwilling:
    """A part of the state that cannot be taken apart, or not take what was loaded."""

    def __init__(self, *, gives: bool, takes: bool) -> None:
        self._gives, self._takes = gives, takes

    def state_dict(self) -> dict[str, Any]:
        if not self._gives:
            raise RuntimeError("no state today")
        return {"number": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self._takes:
            raise RuntimeError("not that state")


def run_load(
    view: Callable[[int], Storage],
    switch: Switch,
    *,
    deadline: timedelta = PATIENT,
    spoil: Callable[[dict[str, Any], int], None] = lambda state, rank: None,
    before_retry: Callable[[], None] = lambda: None,
) -> list[Seen]:
    """Step 1 is saved; loading it meets the fault; then it must load. On every rank."""
    armed, raised = threading.Barrier(RANKS, switch.on.set), threading.Barrier(RANKS, switch.on.clear)

    def act(gangs: sc.Gangs) -> Seen:
        rank = gangs.root.rank
        with sc.CheckpointManager(view(rank), gangs, timeout=deadline) as checkpoints:
            checkpoints.save(1, make_state(rank, 1), replicated=("model",)).result()
            state = blank_state(rank)
            spoil(state, rank)
            before = copy.deepcopy(state)
            armed.wait(60)
            began = time.monotonic()
            error = failure_of(checkpoints, state)
            seconds = time.monotonic() - began
            raised.wait(60)
            before_retry()
            unchanged = same(state, before)
            again = blank_state(rank)
            checkpoints.load(1, again)
            return Seen(error, seconds, unchanged and same(state, before), same(again, make_state(rank, 1)))

    return run_ranks(RANKS, act, timeout=timedelta(seconds=60))


def failure_of(checkpoints: sc.CheckpointManager, state: dict[str, Any]) -> BaseException | None:
    try:
        checkpoints.load(1, state)
    except BaseException as error:
        return error
    return None


def check(table: list[Seen], blamed: int, *, kind: type[sc.CheckpointError], deadline: timedelta = PATIENT) -> None:
    for rank, seen in enumerate(table):
        assert isinstance(seen.error, kind), f"rank {rank} saw {seen.error!r}"
        assert seen.error.step == 1
        assert f"rank {blamed}" in str(seen.error), f"rank {rank}: {seen.error}"
        assert seen.seconds < 1.5 * deadline.total_seconds() + 2.0
        assert seen.unchanged, f"rank {rank}"
        assert seen.loads_again, f"rank {rank}"


def phase(name: str) -> Switch:
    """The operation of a rank's load: it reads indexes and trees first, then tensors, and then looks no more."""
    return {
        "size": Switch(on("size", key=".pt")),
        "index": Switch(on("read_into"), nth=1),
        "data": Switch(on("read_into"), nth=2),
    }[name]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("name", ["size", "index", "data"])
def test_one_rank_cannot_read(tmp_path: Path, place: str, rank: int, name: str) -> None:
    where, switch = make_place(place, tmp_path), phase(name)
    broken = OSError(errno.EIO, "input/output error")

    def view(own: int) -> Storage:
        return where if own != rank else FailingStorage(where, switch, times=None, error=lambda: broken)

    check(run_load(view, switch), rank, kind=sc.CheckpointLoadError)


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("name", ["size", "index", "data"])
def test_a_file_is_gone_for_one_rank(tmp_path: Path, rank: int, name: str) -> None:
    """Which is damage on all: `resume` must then pass the step over everywhere."""
    where, switch = make_place("memory", tmp_path), phase(name)

    def view(own: int) -> Storage:
        return where if own != rank else FailingStorage(where, switch, times=None, error=lambda: FileNotFoundError("x"))

    check(run_load(view, switch), rank, kind=sc.CheckpointDamagedError)


HANGS = [("size", 2), ("index", 1), *[("data", rank) for rank in range(RANKS)]]


def test_one_rank_hangs_in_its_reads_and_wakes_up_late() -> None:
    """The late bytes come while the next load is under way: they reach no state. The rows wait at the same time."""

    def row(name: str, rank: int) -> None:
        table = hang(MemoryStorage(), rank, phase(name))
        check(table, rank, kind=sc.CheckpointLoadError, deadline=SHORT)
        assert not any(isinstance(seen.error, sc.CheckpointDamagedError) for seen in table), "slow is not damaged"

    at_once(partial(row, name, rank) for name, rank in HANGS)


def hang(where: Storage, rank: int, switch: Switch) -> list[Seen]:
    """Of a load in which that operation of that rank does not end before all have raised."""
    gates: list[GatedStorage] = []

    def view(own: int) -> Storage:
        if own != rank:
            return where
        gates.append(GatedStorage(where, switch))
        return gates[0]

    return run_load(view, switch, deadline=SHORT, before_retry=lambda: gates[0].open_gate())


@pytest.mark.parametrize("place", PLACES)
def test_rank_0_cannot_read_the_record(tmp_path: Path, place: str) -> None:
    where, switch = make_place(place, tmp_path), Switch(on("read", key="manifest.json"))
    broken = OSError(errno.EIO, "input/output error")

    def view(own: int) -> Storage:
        return where if own else FailingStorage(where, switch, times=None, error=lambda: broken)

    for seen in run_load(view, switch):
        assert isinstance(seen.error, sc.CheckpointLoadError)
        assert not isinstance(seen.error, sc.CheckpointDamagedError), "the step may be good: it is not passed over"
        assert seen.error.step == 1
        assert "manifest.json" in str(seen.error)
        assert seen.unchanged
        assert seen.loads_again


def test_rank_0_hangs_at_the_record() -> None:
    def row(where: Storage, what: str) -> None:
        check(hang(where, 0, Switch(on(what))), 0, kind=sc.CheckpointError, deadline=SHORT)

    rows = [(MemoryObjects(), "list"), (MemoryStorage(), "size"), (MemoryStorage(), "read")]
    at_once(partial(row, where, what) for where, what in rows)


@pytest.mark.parametrize("rank", range(RANKS))
def test_the_state_of_one_rank_cannot_be_taken_apart(tmp_path: Path, rank: int) -> None:
    where, switch = make_place("memory", tmp_path), Switch(on("none"))

    def spoil(state: dict[str, Any], own: int) -> None:
        if own == rank:
            state["bad"] = Unwilling(gives=False, takes=True)

    check(run_load(lambda own: where, switch, spoil=spoil), rank, kind=sc.CheckpointError)


@pytest.mark.parametrize("rank", range(RANKS))
def test_one_rank_does_not_take_what_was_loaded(tmp_path: Path, rank: int) -> None:
    """The one phase in which states may have changed: so all must know, and none may train on as if it had loaded."""
    where = make_place("memory", tmp_path)

    def act(gangs: sc.Gangs) -> tuple[BaseException | None, bool]:
        own = gangs.root.rank
        with sc.CheckpointManager(where, gangs, timeout=PATIENT) as checkpoints:
            part = Unwilling(gives=True, takes=True)
            checkpoints.save(1, {**make_state(own, 1), "part": part}, replicated=("model",)).result()
            error = failure_of(checkpoints, {**blank_state(own), "part": Unwilling(gives=True, takes=own != rank)})
            again = {**blank_state(own), "part": part}
            checkpoints.load(1, again)
            return error, same(again, make_state(own, 1))

    for error, loads_again in run_ranks(RANKS, act):
        assert isinstance(error, sc.CheckpointLoadError)
        assert not isinstance(error, sc.CheckpointDamagedError)
        assert f"rank {rank}" in str(error)
        assert "not that state" in str(error)
        assert loads_again
