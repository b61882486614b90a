"""A step is saved again, and its storage fails or dies at every single operation: the old one or the new one loads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest

import shardckpt as sc
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import Operation, StorageWrapper
from shardckpt.testing.faults import FailingStorage, RecordingStorage
from tests.faults.gangwork import blank_state, make_state, same

T = TypeVar("T")

LIMIT = timedelta(seconds=20)
OLD, NEW = 1, 2
"""Seeds of the two states that are saved as step 5."""


class NoExchange(MemoryStorage):
    """A file system that cannot swap two folders in one operation."""

    def exchange_folders(self, one: str, other: str) -> bool:
        return False


PLACES: dict[str, Callable[[Path], Storage]] = {
    "memory": lambda folder: MemoryStorage(),
    "no exchange": lambda folder: NoExchange(),
    "objects": lambda folder: MemoryObjects(),
    "local": LocalStorage,
}


class DyingStorage(StorageWrapper):
    """From its n-th operation on the process is as good as dead: nothing that it does reaches the place any more.

    `done`: that operation itself still took place.
    """

    def __init__(self, inner: Storage, *, nth: int, done: bool) -> None:
        super().__init__(inner)
        self._left, self._done = nth, done
        self.died = False

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        self._left -= 1
        if self._left == 0 and self._done:
            call()
        if self._left <= 0:
            self.died = True
            raise ConnectionResetError("injected: the process is dead")
        return call()


FAULTS: dict[str, Callable[[Storage, int], Any]] = {
    "fails": lambda place, nth: FailingStorage(place, nth=nth),
    "fails afterwards": lambda place, nth: FailingStorage(place, nth=nth, after=True),
    "dies before": lambda place, nth: DyingStorage(place, nth=nth, done=False),
    "dies after": lambda place, nth: DyingStorage(place, nth=nth, done=True),
}


def struck(storage: Any) -> bool:
    return storage.died if isinstance(storage, DyingStorage) else bool(storage.failed)


def save(storage: Storage, seed: int, *, step: int = 5) -> sc.CheckpointError | None:
    """One manager's whole life: it saves, and goes."""
    try:
        with sc.CheckpointManager(storage, sc.Gangs.local(), timeout=LIMIT) as checkpoints:
            checkpoints.save(step, make_state(0, seed), replicated=("model",)).result()
    except sc.CheckpointError as error:
        return error
    return None


def look(place: Storage, *, step: int = 5) -> int:
    """Which of the two a new manager finds: it must be one of them, whole."""
    with sc.CheckpointManager(place, sc.Gangs.local(), timeout=LIMIT) as checkpoints:
        assert checkpoints.steps() == [step]
        state = blank_state(0)
        checkpoints.load(step, state)
        resumed = blank_state(0)
        info = checkpoints.resume(resumed)
        assert info is not None
        assert (info.step, info.skipped) == (step, ())
    found = [seed for seed in (OLD, NEW) if same(state, make_state(0, seed))]
    assert len(found) == 1, f"a mixture: {state}"
    assert same(resumed, state)
    return found[0]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.sampled(2)
def test_the_old_or_the_new_one_at_every_operation(tmp_path: Path, place: str, fault: str) -> None:
    found: list[tuple[int, bool]] = []
    for nth in itertools.count(1):
        folder = tmp_path / str(nth)
        folder.mkdir()
        where = PLACES[place](folder)
        assert save(where, OLD) is None
        storage = FAULTS[fault](where, nth)
        error = save(storage, NEW)
        if not struck(storage):
            break
        loaded = look(where)
        told(error, loaded)
        found.append((loaded, error is None))
        assert save(where, NEW) is None, "the next try, by a new process"
        assert look(where) == NEW
    assert error is None
    assert look(where) == NEW
    assert {loaded for loaded, _ in found} == {OLD, NEW}, "before and after the commit"


def told(error: sc.CheckpointError | None, loaded: int) -> None:
    """What the caller was told must be true."""
    if error is None:
        assert loaded == NEW
    elif not isinstance(error, sc.CommitUnknownError):
        assert isinstance(error, sc.CheckpointSaveError)
        assert loaded == OLD, f"told that it was not saved, but it is in force: {error}"


def test_two_saves_that_die_on_the_way_and_one_that_does_not() -> None:
    """Without exchange a crash between the two renames leaves the step aside; the next attempts begin from there."""
    count = len(operations_of_a_replacement())
    for first, second in itertools.product(range(1, count + 1), repeat=2):
        if abs(first - second) > 1:  # a diagonal of the square: a second crash near the place of the first
            continue
        where = NoExchange()
        assert save(where, OLD) is None
        save(DyingStorage(where, nth=first, done=True), NEW)
        look(where)
        save(DyingStorage(where, nth=second, done=True), NEW)
        look(where)
        assert save(where, NEW) is None
        assert look(where) == NEW


def operations_of_a_replacement() -> tuple[Operation, ...]:
    where = NoExchange()
    assert save(where, OLD) is None
    recording = RecordingStorage(where)
    assert save(recording, NEW) is None
    return recording.operations
