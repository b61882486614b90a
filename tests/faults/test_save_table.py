"""Each phase of a save x each rank x {raises, hangs}: no record, no hang, every rank raised, the next save succeeds."""

from __future__ import annotations

import errno
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import shardckpt as sc
from shardckpt.engine.committing import receipts, transaction
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.testing.faults import FailingStorage, GatedStorage, on
from tests.faults.gangwork import PATIENT, PLACES, RANKS, SHORT, Outcome, at_once, make_place, make_state, run_row


def check(
    outcomes: list[Outcome], blamed: int, *, steps: list[int] | None = None, deadline: timedelta = PATIENT
) -> None:
    limit_s = 1.5 * deadline.total_seconds() + 2.0  # one phase that overruns, the grace of those that wait for its end
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome.error, sc.CheckpointError), f"rank {rank} saw {outcome.error!r}"
        assert outcome.seconds < limit_s, f"rank {rank} took {outcome.seconds:.1f} s"
        if rank != blamed:
            assert f"rank {blamed}" in str(outcome.error), f"rank {rank}: {outcome.error}"
            assert isinstance(outcome.error, sc.CheckpointSaveError)
            assert outcome.error.step == 2
        assert outcome.after == {"steps": [1], 1: True, 2: True, 3: True}


def leftovers(place: Storage) -> list[str]:
    return [name for name in place.list() if name.endswith((".tmp/", ".old/"))]


class Unwilling:
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no state today")

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("what", ["state_dict", "plan"])
def test_the_state_of_one_rank_is_bad(tmp_path: Path, place: str, rank: int, what: str) -> None:
    def spoil(state: dict[str, Any], own: int) -> None:
        if own == rank:
            state["bad"] = Unwilling() if what == "state_dict" else (lambda: 0)

    where = make_place(place, tmp_path)
    outcomes = run_row(where, lambda manager, own: None, spoil=spoil)
    for outcome in outcomes:  # the retry of step 2 and step 3 went through
        assert outcome.after == {"steps": [1], 1: True, 2: True, 3: True}
    wrong = RuntimeError if what == "state_dict" else sc.InvalidStateError
    assert isinstance(outcomes[rank].error, wrong)
    for own, outcome in enumerate(outcomes):
        if own != rank:
            assert isinstance(outcome.error, sc.CheckpointSaveError)
            assert f"rank {rank}" in str(outcome.error)
    assert leftovers(where) == []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rank", range(RANKS))
def test_one_rank_cannot_write(tmp_path: Path, place: str, rank: int) -> None:
    armed = threading.Event()

    def view(own: int, storage: Storage) -> Storage:
        if own != rank:
            return storage
        full = OSError(errno.ENOSPC, "no space left")
        when = on("put", key=f"rank_{rank}.pt")
        return FailingStorage(storage, lambda op: armed.is_set() and when(op), error=lambda: full)

    where = make_place(place, tmp_path)
    check(run_row(where, lambda manager, own: armed.set(), view=view), rank)
    assert leftovers(where) == []


@pytest.mark.parametrize("place", PLACES)
def test_one_rank_hangs_in_its_write_and_wakes_up_late(tmp_path: Path, place: str) -> None:
    """The writer wakes up after everybody has given up, while the retry is under way: it harms nothing.

    Each of the ranks, in a row of its own; the rows wait at the same time.
    """
    at_once(partial(hang_in_write, make_place(place, tmp_path / str(rank)), rank) for rank in range(RANKS))


def hang_in_write(where: Storage, rank: int) -> None:
    armed = threading.Event()
    gates: list[GatedStorage] = []

    def view(own: int, storage: Storage) -> Storage:
        if own != rank:
            return storage
        when = on("put", key=f"rank_{rank}.pt")

        def once(operation: Any) -> bool:
            if armed.is_set() and when(operation):
                armed.clear()
                return True
            return False

        gates.append(GatedStorage(storage, once))
        return gates[0]

    def let_go(own: int) -> None:
        if own == rank:
            gates[0].open_gate()

    def arm(manager: sc.CheckpointManager, own: int) -> None:
        if own == rank:
            armed.set()

    check(run_row(where, arm, view=view, before_retry=let_go, deadline=SHORT), rank, deadline=SHORT)


ON_RANK_0 = [(place, phase) for place in ("memory", "local") for phase in ("make room", "record", "sync", "rename")]
ON_RANK_0 += [("objects", "record")]  # an object store has no folders


@pytest.mark.parametrize(("place", "phase"), ON_RANK_0)
def test_rank_0_fails_alone(tmp_path: Path, place: str, phase: str) -> None:
    when = {
        "make room": on("make_folder"),
        "record": on("put", key="manifest.json"),
        "sync": on("sync_folder"),
        "rename": on("rename_folder"),
    }[phase]
    where = make_place(place, tmp_path)
    armed = threading.Event()

    def view(own: int, storage: Storage) -> Storage:
        if own:
            return storage
        broken = OSError(errno.EIO, "input/output error")
        return FailingStorage(storage, lambda op: armed.is_set() and when(op), error=lambda: broken)

    check(run_row(where, lambda manager, own: armed.set(), view=view), 0)
    assert leftovers(where) == []


def test_rank_0_cannot_tell_whether_the_rename_is_durable(tmp_path: Path) -> None:
    """The folder was renamed, but syncing its parent failed: unknown, nothing is deleted, and the step counts."""
    where = make_place("memory", tmp_path)
    assert isinstance(where, RenamingStorage)
    real, armed = where.rename_folder, threading.Event()

    def rename_then_fail(source: str, target: str) -> None:
        real(source, target)
        if armed.is_set():
            armed.clear()
            raise OSError(errno.EIO, "the folder could not be synced")

    where.rename_folder = rename_then_fail  # type: ignore[method-assign]
    outcomes = run_row(where, lambda manager, own: armed.set() if own == 0 else None)
    for outcome in outcomes:
        assert isinstance(outcome.error, sc.CommitUnknownError)
        assert outcome.after == {"steps": [1, 2], 1: True, 2: True, 3: True}


@pytest.mark.parametrize("function", ["open_bundles", "disagreements", "compose_manifest", "merge_tables"])
def test_rank_0_cannot_make_a_record_of_what_was_said(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Receipts of another version, say. The others hear at once what is wrong, and do not wait for their deadline."""
    armed, module = threading.Event(), receipts if function == "merge_tables" else transaction
    real = getattr(module, function)

    def refuse(*args: Any, **options: Any) -> Any:
        if armed.is_set():
            armed.clear()
            raise ValueError("of another version")
        return real(*args, **options)

    def spoil(state: dict[str, Any], rank: int) -> None:
        state["new"] = rank  # so that there is a table to be told of
        if rank == 0:
            armed.set()

    monkeypatch.setattr(module, function, refuse)
    outcomes = run_row(make_place("objects", Path()), lambda manager, rank: None, spoil=spoil)
    check(outcomes, 0)
    assert all("of another version" in str(outcome.error) for outcome in outcomes)


def test_rank_0_that_stood_still_before_the_record_does_not_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have given up, and on an object store the attempt's files may have been swept meanwhile."""
    late_s, real = [0.0], transaction.check_agreed

    def stand_still(*args: Any) -> None:
        real(*args)
        late_s[0] += stops.pop() if stops else 0.0

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late_s[0])
    monkeypatch.setattr(transaction, "time", clock)
    monkeypatch.setattr(transaction, "check_agreed", stand_still)
    place, stops = make_place("objects", Path()), [3600.0, 0.0]
    with sc.CheckpointManager(place, timeout=PATIENT) as checkpoints:
        checkpoints.save(1, make_state(0, 1)).result()
        with pytest.raises(sc.CheckpointSaveError, match=r"it took 3\.6e\+03 s to come to the record"):
            checkpoints.save(2, make_state(0, 2)).result()
        assert checkpoints.steps() == [1]
        checkpoints.save(2, make_state(0, 2)).result()
        assert checkpoints.steps() == [1, 2]
