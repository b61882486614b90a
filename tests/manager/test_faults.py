"""What goes wrong on one rank of a transaction is told to all, harms no committed step, and leaves nothing behind.

fairseq2's manager let the other ranks wait for the process group's deadline, had destroyed the committed step of the
same number by then, and published what there was at the next commit.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt as sc
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import Operation
from shardckpt.testing.faults import FailingStorage, GatedStorage, When, on
from shardckpt.testing.gangs import run_ranks, run_ranks_settled
from tests.manager.transactions import NEVER, Size, equal, on_ranks, state_of, transact

RANKS = Size(3)


class Unwilling(nn.Module):
    """What a program saves, and what refuses to be saved."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 2))
        self._error = error

    def state_dict(self, *args: Any, **options: Any) -> Any:
        if self._error is not None:
            raise self._error
        return super().state_dict(*args, **options)


def transaction(manager: sc.CheckpointManager, gangs: sc.Gangs, step: int, *, spoilt: str = "") -> None:
    """One with everything in it; `spoilt` says what of it cannot be saved on this rank."""
    refusal = RuntimeError("not today")
    manager.begin_checkpoint(step)
    state = {**given(gangs, step), **({"hook": print} if spoilt == "state with code" else {})}
    state |= {"sampler": Unwilling(refusal)} if spoilt == "state" else {}
    manager.save_state(state, replicated_keys={"epoch"})
    manager.save_metadata({"of": step, "hook": print if spoilt == "metadata" else None})
    manager.save_consolidated_fsdp_model(Unwilling(refusal if spoilt == "model" else None))
    manager.save_score(0.5)
    manager.commit_checkpoint()


def given(gangs: sc.Gangs, step: int) -> dict[str, Any]:
    return state_of(gangs, {"epoch"}, base=100_000 * step)


@dataclass(frozen=True)
class Fault:
    """What goes wrong, on any one of these ranks."""

    ranks: tuple[int, ...]
    message: str = "no space left"
    operation: When | None = None
    """The operation of its storage that fails; if none does, that part of the transaction cannot be saved."""


FAULTS = {
    "begin": Fault((0,), operation=on("make_folder")),
    "state": Fault((0, 1, 2), message="not today"),
    "state with code": Fault((0, 1, 2), message="hook: a value of type builtins.builtin_function_or_method"),
    "metadata": Fault((0,), message="metadata: hook: a value of type builtins"),
    "metadata file": Fault((0,), operation=on("put", key="/metadata.pt")),
    "model": Fault((0, 1, 2), message="not today"),
    "model file": Fault((0,), operation=on("put", key="/model.pt")),
    "rank's file": Fault((0, 1, 2), operation=on("put", "put_range", key="/rank_")),
    "shared file": Fault((1,), operation=on("put", "put_range", key="/replicated.pt")),
    "copy": Fault((0,), operation=on("put", key="/config.json")),
    "score": Fault((0,), operation=on("put", key="/score.txt")),
    "record": Fault((0,), operation=on("put", "replace", "swap", key="/manifest.json")),
    "rename": Fault((0,), operation=on("rename_folder", "exchange_folders")),
}
ROWS = [(name, rank) for name, fault in FAULTS.items() for rank in fault.ranks]


class Spoiling:
    """A storage for each rank; that of one rank fails while `armed` is set."""

    def __init__(self, place: Storage, fault: Fault, rank: int) -> None:
        self.armed = threading.Event()
        self._place, self._rank = place, rank
        self._operation = fault.operation or (lambda operation: False)

    def __call__(self, rank: int) -> Storage:
        return FailingStorage(self._place, self._is_due if rank == self._rank else no_operation, times=None, error=full)

    def _is_due(self, operation: Operation) -> bool:
        return self.armed.is_set() and self._operation(operation)


def no_operation(operation: Operation) -> bool:
    return False


def full() -> OSError:
    return OSError(errno.ENOSPC, "no space left")


@pytest.mark.parametrize("step", [1, 2], ids=["a committed step again", "a new step"])
@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
@pytest.mark.parametrize(("what", "rank"), ROWS)
@pytest.mark.sampled(2)
def test_a_fault_on_one_rank(what: str, rank: int, kind: type, step: int) -> None:
    if kind is MemoryObjects and what in ("begin", "rename"):
        pytest.skip("an object store has no such operation")
    place = kind()
    place.put("cc/config.json", [b"{}"])
    storages, met = Spoiling(place, FAULTS[what], rank), threading.Barrier(RANKS.ranks)

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        own = gangs.root.rank
        transaction(manager, gangs, 1)
        met.wait()
        before = tree(place)
        storages.armed.set()
        with pytest.raises(sc.CheckpointSaveError, match=FAULTS[what].message) as caught:
            transaction(manager, gangs, step, spoilt=what if own == rank else "")
        assert caught.value.step == step
        assert caught.value.__cause__ is not None
        assert f"rank {rank}" in str(caught.value)
        met.wait()
        storages.armed.clear()
        assert tree(place) == before
        with pytest.raises(sc.InvalidOperationError, match="begin_checkpoint"):
            manager.commit_checkpoint()
        assert manager.get_step_numbers() == [1]
        equal(manager.load_checkpoint(1), given(gangs, 1))
        for again in (step, 3):
            transaction(manager, gangs, again)
            equal(manager.load_checkpoint(again), given(gangs, again))

    on_ranks(RANKS, storages, act)


def tree(storage: Storage, folder: str = "") -> set[str]:
    """All keys of a storage."""
    names = [folder + name for name in storage.list(folder.rstrip("/"))]
    return {key for name in names for key in (tree(storage, name) if name.endswith("/") else {name})}


def test_a_rank_that_never_comes() -> None:
    """Nobody can tell the others of that; they wait as long as the manager was told to, and no longer."""
    place, over = MemoryStorage(), threading.Barrier(3)

    def act(gangs: sc.Gangs) -> str:
        with sc.CheckpointManager(place, gangs, timeout=timedelta(seconds=2)) as manager:
            transact(manager, 1, given(gangs, 1))
            manager.begin_checkpoint(2)
            if gangs.root.rank == 1:
                over.wait()
            with pytest.raises(sc.CheckpointSaveError) as caught:
                manager.save_state(given(gangs, 2))
            assert caught.value.step == 2
            if gangs.root.rank != 1:
                over.wait()
            transact(manager, 3, given(gangs, 3))
            equal(manager.load_checkpoint(3), given(gangs, 3))
            assert manager.get_step_numbers() == [1, 3]
            return str(caught.value)

    told = run_ranks(3, act)
    assert all("rank 1 did not answer" in told[rank] for rank in (0, 2))


@pytest.mark.parametrize("state", [None, {}], ids=["none", "empty"])
def test_an_empty_transaction_is_no_checkpoint(state: dict[str, Any] | None) -> None:
    place = MemoryStorage()

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        transact(manager, 1, given(gangs, 1))
        for step in (1, 2):
            manager.begin_checkpoint(step)
            manager.save_metadata({"of": "nothing"})
            manager.save_score(1.0)
            if state is not None:
                manager.save_state(state)
            with pytest.raises(sc.CheckpointSaveError, match="empty") as caught:
                manager.commit_checkpoint()
            assert caught.value.step == step
        assert manager.get_step_numbers() == [1]
        equal(manager.load_checkpoint(1), given(gangs, 1))

    on_ranks(Size(2), place, act)
    assert place.list() == ["step_1/"]


def test_ranks_may_hold_different_keys_or_none() -> None:
    """How many messages are exchanged does not depend on what a rank has."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        rank = gangs.root.rank
        state: dict[str, Any] = [{}, {"own": torch.ones(2)}, {"model": {"w": torch.zeros(3)}, "epoch": 3}][rank]
        for step, replicated in ((1, None), (2, {"*"} if rank == 0 else None)):
            transact(manager, step, state, replicated_keys=replicated)
            equal(manager.load_checkpoint(step), state)

    on_ranks(RANKS, MemoryStorage(), act)


def test_what_is_declared_alike_and_is_not() -> None:
    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        transact(manager, 1, given(gangs, 1))
        manager.begin_checkpoint(1)
        manager.save_state(given(gangs, 2), replicated_keys={"optimizer"})
        with pytest.raises(sc.CheckpointSaveError, match=r"optimizer\.state\.0\.exp_avg \(for example ranks 0 and 1\)"):
            manager.commit_checkpoint()
        equal(manager.load_checkpoint(1), given(gangs, 1))

    on_ranks(RANKS, MemoryStorage(), act)


def test_abort_on_all_ranks() -> None:
    place = MemoryStorage()

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.abort_checkpoint()  # there is none: nothing is done
        transact(manager, 1, given(gangs, 1))
        for step in (1, 2):
            manager.begin_checkpoint(step)
            manager.save_metadata({"of": step})
            manager.save_state(given(gangs, 7))
            manager.save_consolidated_fsdp_model(Unwilling())
            equal(manager.load_checkpoint(1), given(gangs, 1))
            manager.abort_checkpoint()
            with pytest.raises(sc.InvalidOperationError):
                manager.commit_checkpoint()
        assert manager.get_step_numbers() == [1]
        equal(manager.load_checkpoint(1), given(gangs, 1))
        transact(manager, 2, given(gangs, 2))
        equal(manager.load_last_checkpoint(), (2, given(gangs, 2)))

    on_ranks(RANKS, place, act)
    assert place.list() == ["step_1/", "step_2/"]


CALLS: dict[str, Callable[[sc.CheckpointManager, sc.Gangs], object]] = {
    "save_state": lambda manager, gangs: manager.save_state(given(gangs, 2)),
    "save_metadata": lambda manager, gangs: manager.save_metadata({"of": 2}),
    "save_consolidated_fsdp_model": lambda manager, gangs: manager.save_consolidated_fsdp_model(Unwilling()),
    "commit_checkpoint": lambda manager, gangs: manager.commit_checkpoint(),
}


@pytest.mark.parametrize("rank", range(RANKS.ranks))
@pytest.mark.parametrize("call", CALLS)
def test_abort_on_one_rank_only(call: str, rank: int) -> None:
    """The others learn of it with what they do next, whatever that is."""
    place = MemoryStorage()

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        transact(manager, 2, given(gangs, 1))
        manager.begin_checkpoint(2)
        if call == "commit_checkpoint":
            manager.save_state(given(gangs, 2))
        if gangs.root.rank == rank:
            manager.abort_checkpoint()
        else:
            with pytest.raises(
                sc.CheckpointSaveError, match=rf"rank {rank}: .*abort_checkpoint\(\) was called"
            ) as caught:
                CALLS[call](manager, gangs)
            assert caught.value.step == 2
        equal(manager.load_checkpoint(2), given(gangs, 1))
        transact(manager, 2, given(gangs, 2))
        equal(manager.load_checkpoint(2), given(gangs, 2))

    on_ranks(RANKS, place, act)
    assert place.list() == ["step_2/"]


def test_leaving_the_with_gives_an_open_checkpoint_up() -> None:
    place = MemoryStorage()

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        transact(manager, 1, given(gangs, 1))
        manager.begin_checkpoint(1)
        manager.save_state(given(gangs, 2))

    on_ranks(RANKS, place, act)
    assert place.list() == ["step_1/"]
    on_ranks(RANKS, place, lambda manager, gangs: equal(manager.load_checkpoint(1), given(gangs, 1)))


@pytest.mark.parametrize("rank", range(RANKS.ranks))
@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_the_program_on_one_rank(call: str, rank: int) -> None:
    """It goes out of the `with` there; the others are told that the checkpoint was given up."""

    class TrainingError(Exception):
        pass

    def act(gangs: sc.Gangs) -> None:
        with sc.CheckpointManager(place, gangs, timeout=NEVER) as manager:
            manager.begin_checkpoint(2)
            if call == "commit_checkpoint":
                manager.save_state(given(gangs, 2))
            if gangs.root.rank == rank:
                raise TrainingError
            CALLS[call](manager, gangs)

    place = MemoryStorage()
    for own, outcome in enumerate(run_ranks_settled(RANKS.ranks, act)):
        assert isinstance(outcome, TrainingError if own == rank else sc.CheckpointSaveError), outcome
        assert own == rank or f"rank {rank}: " in str(outcome)
        assert own == rank or "left the `with` before commit_checkpoint()" in str(outcome)
    assert place.list() == []


@pytest.mark.parametrize("rank", range(RANKS.ranks))
def test_an_interrupt_is_told_to_the_others_and_goes_on(rank: int) -> None:
    place = MemoryStorage()

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.begin_checkpoint(1)
        mine = gangs.root.rank == rank
        error: type[BaseException] = KeyboardInterrupt if mine else sc.CheckpointSaveError
        with pytest.raises(error, match=None if mine else f"rank {rank}: KeyboardInterrupt"):
            manager.save_state({"model": Unwilling(KeyboardInterrupt() if mine else None)})
        transact(manager, 1, given(gangs, 1))

    on_ranks(RANKS, place, act)
    assert place.list() == ["step_1/"]


def test_ctrl_c_while_the_work_is_waited_for() -> None:
    """The save thread ends what it is at; then the end of the `with` gives the checkpoint up."""
    place = MemoryStorage()
    storage = GatedStorage(place, on("put", key="metadata"))

    def press() -> None:
        assert storage.reached.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        storage.open_gate()

    def save() -> None:
        with sc.CheckpointManager(storage, sc.Gangs.local(), timeout=NEVER) as manager:
            manager.begin_checkpoint(1)
            manager.save_state({"model": {"w": torch.ones(2)}})
            manager.save_metadata({"of": 1})

    presses = threading.Thread(target=press)
    presses.start()
    with pytest.raises(KeyboardInterrupt):
        save()
    presses.join()
    assert place.list() == []
