"""Where the failure of a save comes up, what becomes of a save under way, and what a long life leaves behind."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.saving.stage import Staging
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import Operation
from shardckpt.testing.faults import FailingStorage, GatedStorage, on
from shardckpt.testing.gangs import run_ranks
from tests.faults.gangwork import PATIENT, RANKS, blank_state, make_state, same

LIMIT = timedelta(seconds=20)
LIMIT_S = LIMIT.total_seconds()


def full() -> OSError:
    return OSError(errno.ENOSPC, "no space left")


def failing(place: Storage, *, key: str = ".pt", times: int | None = None) -> FailingStorage:
    return FailingStorage(place, on("put", key=key), times=times, error=full)


def manager(storage: Storage, **options: Any) -> sc.CheckpointManager:
    return sc.CheckpointManager(storage, sc.Gangs.local(), timeout=LIMIT, **options)


def test_result_raises_the_failure_as_often_as_it_is_asked_for() -> None:
    with manager(failing(MemoryStorage())) as checkpoints:
        pending = checkpoints.save(1, make_state(0, 1))
        for _ in range(2):
            with pytest.raises(sc.CheckpointSaveError, match="no space left"):
                pending.result(LIMIT)
        checkpoints.wait()  # it has been seen; so nothing is raised here, nor at the end


def test_wait_raises_a_failure_that_nobody_looked_at_once() -> None:
    with manager(failing(MemoryStorage())) as checkpoints:
        checkpoints.save(1, make_state(0, 1))
        with pytest.raises(sc.CheckpointSaveError, match="no space left") as caught:
            checkpoints.wait()
        assert caught.value.step == 1
        checkpoints.wait()


def test_the_end_of_the_with_raises_a_failure_that_nobody_looked_at() -> None:
    with pytest.raises(sc.CheckpointSaveError, match="step 1 was not saved"), manager(failing(MemoryStorage())) as its:
        its.save(1, make_state(0, 1))


@pytest.mark.parametrize("tolerate", [0, 1, 2])
def test_save_logs_so_many_failures_in_a_row_and_then_raises(tolerate: int, caplog: pytest.LogCaptureFixture) -> None:
    place, healthy = MemoryStorage(), threading.Event()
    storage = FailingStorage(place, lambda op: not healthy.is_set() and on("put")(op), times=None, error=full)
    with caplog.at_level(logging.ERROR), manager(storage, tolerate=tolerate) as checkpoints:
        for attempt in range(2):  # a good save in between begins the count anew
            caplog.clear()
            for number in range(1 + tolerate):
                checkpoints.save(10 * attempt + number, make_state(0, number))
            with pytest.raises(sc.CheckpointSaveError, match=f"step {10 * attempt + tolerate} was not saved"):
                checkpoints.save(100, make_state(0, 5))
            assert caplog.text.count("in a row") == tolerate
            healthy.set()
            checkpoints.save(200 + attempt, make_state(0, 5)).result(LIMIT)
            healthy.clear()
        assert checkpoints.steps() == [200, 201]


def test_save_raises_on_all_ranks_whoever_looked_at_the_failures() -> None:
    """Rank 1 looks at each, the others at none: if only these raised, rank 1 would go on to save by itself."""
    place, healthy = MemoryStorage(), threading.Event()
    when: Callable[[Operation], bool] = lambda op: not healthy.is_set() and on("put", key="rank_2")(op)  # noqa: E731

    def act(gangs: sc.Gangs) -> tuple[int, list[int]]:
        rank = gangs.root.rank
        storage = FailingStorage(place, when, times=None, error=full)
        with sc.CheckpointManager(storage, gangs, timeout=PATIENT, tolerate=1) as checkpoints:
            raised = 0
            for step in range(1, 10):
                try:
                    pending = checkpoints.save(step, make_state(rank, step), replicated=("model",))
                except sc.CheckpointSaveError:
                    raised = step
                    break
                if rank == 1:
                    with pytest.raises(sc.CheckpointSaveError):
                        pending.result(LIMIT)
            healthy.set()
            checkpoints.save(20, make_state(rank, 20), replicated=("model",)).result(LIMIT)
            return raised, checkpoints.steps()

    assert run_ranks(RANKS, act) == [(3, [20])] * RANKS


class Opening(sc.CheckpointManager):
    """Lets the save under way go on when the manager is about to be closed, and not before."""

    gate: GatedStorage

    def close(self) -> None:
        self.gate.open_gate()
        super().close()


@pytest.mark.parametrize("key", ["rank_0.pt", "manifest.json"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
def test_an_exception_of_the_training_loop_leaves_the_with_as_it_is(
    key: str, fails: bool, kind: type[Storage], caplog: pytest.LogCaptureFixture
) -> None:
    """The save under way is waited for; if that fails besides, it is logged and does not hide what happened first."""
    place = kind()
    gated = GatedStorage(failing(place, key=key) if fails else place, on("put", key=key))
    with manager(place) as checkpoints:
        checkpoints.save(1, make_state(0, 1)).result(LIMIT)
    trouble = ZeroDivisionError("the loss is gone")

    def train() -> None:
        with Opening(gated, sc.Gangs.local(), timeout=LIMIT) as opening:
            opening.gate = gated
            opening.save(2, make_state(0, 2))
            assert gated.reached.wait(LIMIT_S)
            raise trouble

    with pytest.raises(ZeroDivisionError) as caught:
        train()
    assert caught.value is trouble
    assert ("step 2 was not saved" in caplog.text) == fails
    with manager(place) as checkpoints:
        assert checkpoints.steps() == ([1] if fails else [1, 2])
        state = blank_state(0)
        info = checkpoints.resume(state)
        assert info is not None
        assert same(state, make_state(0, info.step))


def test_a_manager_may_be_closed_twice_and_saves_no_more() -> None:
    place = MemoryStorage()
    with manager(place) as checkpoints:
        checkpoints.save(1, make_state(0, 1))
        checkpoints.close()
        checkpoints.close()
        with pytest.raises(sc.CheckpointSaveError, match="closed"):
            checkpoints.save(2, make_state(0, 2))
    with manager(place) as checkpoints:
        assert checkpoints.steps() == [1]


class Training:
    """A model with its optimizer, as far as a save and a step need it."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = torch.nn.Linear(30, 20)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.backward()
        self.optimizer.step()
        self.state = {"model": self.model, "optimizer": self.optimizer}

    def backward(self) -> None:
        self.model(torch.ones(2, 30)).sum().backward()

    @property
    def weight(self) -> torch.Tensor:
        return self.model.weight.detach().clone()


class Copying:
    """Takes the place of `Staging.copy`: that of parameters, on the copying thread, does `before` first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> None:
        real = Staging.copy

        def copy(staging: Staging, wanted: Callable[[torch.Tensor], bool]) -> None:
            if threading.current_thread().name.startswith("shardckpt-copy"):
                before()
            real(staging, wanted)

        monkeypatch.setattr(Staging, "copy", copy)


@pytest.mark.parametrize("by", ["step", "guard"])
def test_training_waits_for_the_copy_before_it_changes_parameters(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    training, arrived, passed = Training(), threading.Event(), threading.Event()
    early: list[bool] = []

    def before() -> None:  # the copy begins when training is about to change what is to be copied
        assert arrived.wait(LIMIT_S)
        early.append(passed.wait(0.3))  # it does not come; had it, that would be at once

    Copying(monkeypatch, before)
    training.optimizer.register_step_pre_hook(lambda *_: arrived.set())
    with manager(MemoryStorage()) as checkpoints:
        saved = training.weight
        pending = checkpoints.save(1, training.state)
        stall_s = pending.report.stall_s
        training.backward()
        if by == "step":
            training.optimizer.register_step_pre_hook(lambda *_: passed.set())  # hooks run in this order
            training.optimizer.step()
        else:
            arrived.set()
            with checkpoints.guard():
                passed.set()
                training.model.weight.data.zero_()
        pending.result(LIMIT)
        assert early == [False]
        assert pending.report.stall_s > stall_s, "the wait counts"
        assert not torch.equal(training.weight, saved)
        checkpoints.load(1, training.state)
        assert torch.equal(training.weight, saved)


def test_a_copy_that_fails_does_not_hold_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    training, troubles = Training(), [MemoryError("no page left")]

    def before() -> None:
        if troubles:
            raise troubles.pop()

    Copying(monkeypatch, before)
    with manager(MemoryStorage()) as checkpoints:
        pending = checkpoints.save(1, training.state)
        training.optimizer.step()
        assert pending.staged(timedelta(0))
        with pytest.raises(sc.CheckpointSaveError, match="no page left"):
            pending.result(LIMIT)
        saved = training.weight
        checkpoints.save(2, training.state).result(LIMIT)
        training.optimizer.step()
        checkpoints.load(2, training.state)
        assert torch.equal(training.weight, saved)
        assert checkpoints.steps() == [2]


def test_a_storage_that_hangs_in_pruning_does_not_hold_the_training() -> None:
    """Its step is committed; what is saved next is copied on the same thread, and the optimizer waits for that."""
    training = Training()
    gated = GatedStorage(MemoryStorage(), on("delete", "delete_tree"))
    soon = timedelta(seconds=1)
    try:
        with sc.CheckpointManager(gated, sc.Gangs.local(), keep=sc.KeepLast(1), timeout=soon) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(step, training.state).result(LIMIT)
                training.optimizer.step()
            assert gated.reached.is_set()
            assert 3 in checkpoints.steps()
    finally:
        gated.open_gate()
