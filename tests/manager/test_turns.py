"""The order of calls: what is called out of turn is refused and changes nothing; what goes on in the background."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

import shardckpt as sc
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import Operation, StorageWrapper
from shardckpt.testing.faults import FailingStorage, GatedStorage, RecordingStorage, on
from tests.manager.transactions import NEVER, Size, equal, on_ranks, state_of, transact

T = TypeVar("T")

Call = Callable[[sc.CheckpointManager], object]

MODEL = nn.Linear(2, 2)
STATE = {"model": {"w": torch.ones(3)}, "epoch": 5}

NEED_AN_OPEN_ONE: dict[str, Call] = {
    "save_state": lambda manager: manager.save_state(STATE),
    "save_metadata": lambda manager: manager.save_metadata({"a": 1}),
    "save_score": lambda manager: manager.save_score(1.0),
    "save_no_score": lambda manager: manager.save_score(None),
    "save_consolidated_fsdp_model": lambda manager: manager.save_consolidated_fsdp_model(MODEL),
    "commit_checkpoint": lambda manager: manager.commit_checkpoint(),
}
NEED_NONE: dict[str, Call] = {
    "begin_checkpoint": lambda manager: manager.begin_checkpoint(2),
    "begin_checkpoint of the same": lambda manager: manager.begin_checkpoint(1),
    "save": lambda manager: manager.save(2, STATE),
}
ONCE = ("save_state", "save_metadata", "save_consolidated_fsdp_model")


def local(storage: Storage, **options: Any) -> sc.CheckpointManager:
    return sc.CheckpointManager(storage, sc.Gangs.local(), timeout=NEVER, **options)


@pytest.mark.parametrize("call", NEED_AN_OPEN_ONE)
def test_without_begin(call: str) -> None:
    place = MemoryStorage()
    with local(place) as manager:
        for _ in range(2):
            with pytest.raises(sc.InvalidOperationError, match=r"begin_checkpoint\(\) must be called first"):
                NEED_AN_OPEN_ONE[call](manager)
            transact(manager, 1, STATE)
    assert place.list() == ["step_1/"]


@pytest.mark.parametrize("call", NEED_NONE)
def test_while_a_checkpoint_is_open(call: str) -> None:
    with local(MemoryStorage()) as manager:
        manager.begin_checkpoint(1)
        with pytest.raises(sc.InvalidOperationError, match="while the checkpoint of step 1 is open") as caught:
            NEED_NONE[call](manager)
        assert caught.value.step == 1
        manager.save_state(STATE)
        manager.commit_checkpoint()
        assert manager.get_step_numbers() == [1]
        equal(manager.load_checkpoint(1), STATE)


@pytest.mark.parametrize("call", ONCE)
def test_twice(call: str) -> None:
    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.begin_checkpoint(1)
        for _ in range(2):
            NEED_AN_OPEN_ONE[call](manager)
            with pytest.raises(sc.InvalidOperationError, match="was called before for step 1") as caught:
                NEED_AN_OPEN_ONE[call](manager)
            assert caught.value.step == 1
            if call == "save_metadata":
                manager.save_state(STATE)
            manager.commit_checkpoint()
            manager.begin_checkpoint(1)

    on_ranks(Size(2), MemoryStorage(), act)


@pytest.mark.parametrize("step", [-1, 10**18, "7", None, 1.5], ids=str)
def test_no_step(step: Any) -> None:
    """Refused before anything is done."""
    place = MemoryStorage()
    with local(place) as manager:
        with pytest.raises(sc.InvalidStateError, match="cannot be saved as a step"):
            manager.begin_checkpoint(step)
        assert not manager.has_checkpoint()
        transact(manager, 0, STATE)
        assert manager.has_checkpoint()
        assert manager.has_checkpoint(0)
        assert not manager.has_checkpoint(1)
    assert place.list() == ["step_0/"]


@pytest.mark.parametrize("step", [np.int64(7), torch.tensor(7)], ids=["numpy", "tensor"])
def test_steps_of_other_kinds_of_numbers(step: Any) -> None:
    with local(MemoryStorage()) as manager:
        transact(manager, step, STATE)
        assert manager.save(step + 1, STATE).result().step == 8
        assert manager.get_step_numbers() == [7, 8]
        equal(manager.load_checkpoint(7), STATE)


@pytest.mark.parametrize("score", [math.nan, torch.tensor(math.nan), "good", [1.0], torch.ones(2)], ids=str)
def test_no_score(score: Any) -> None:
    """The checkpoint stays open, and may be committed without it or with another."""
    with local(MemoryStorage()) as manager:
        manager.begin_checkpoint(1)
        manager.save_state(STATE)
        for lower_better in (False, True):
            with pytest.raises(sc.InvalidStateError, match="a score") as caught:
                manager.save_score(score, lower_better=lower_better)
            assert caught.value.step == 1
        manager.commit_checkpoint()
        equal(manager.load_checkpoint(1), STATE)


def test_steps_without_a_score_and_negative_ones() -> None:
    """fairseq2 could not read its own "--0.3", and raised for a step that had no score."""
    scores: dict[int, float | None] = {1: -0.3, 2: None, 3: 0.5, 4: -0.7, 5: 0.1, 6: None}

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        for step, score in scores.items():
            manager.begin_checkpoint(step)
            manager.save_state(state_of(gangs))
            manager.save_score(score, lower_better=True)
            manager.commit_checkpoint()
        for n in (0, -1):
            with pytest.raises(sc.InvalidStateError, match="cannot be kept"):
                manager.keep_best_n_checkpoints(n)
            with pytest.raises(sc.InvalidStateError, match="cannot be kept"):
                manager.keep_last_n_checkpoints(n)
        assert manager.get_step_numbers() == [1, 2, 3, 4, 5, 6]
        manager.keep_best_n_checkpoints(2)
        assert manager.get_step_numbers() == [1, 4, 6]  # the last one always stays
        manager.keep_last_n_checkpoints(1)
        assert manager.get_step_numbers() == [6]

    on_ranks(Size(2), MemoryStorage(), act)


def test_deletion_of_what_is_not_there() -> None:
    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        with pytest.raises(sc.CheckpointDeleteError, match="step 7") as caught:
            manager.delete_checkpoint(7)
        assert caught.value.step == 7
        manager.delete_checkpoint(7, missing_ok=True)

    on_ranks(Size(2), MemoryStorage(), act)


@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
def test_a_step_whose_record_is_damaged_can_be_deleted(kind: type) -> None:
    place = kind()

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        transact(manager, 1, STATE)
        place.replace("step_1/manifest.json", b"{}")
        with pytest.raises(sc.CheckpointDamagedError):
            manager.load_checkpoint(1)
        manager.delete_checkpoint(1)
        assert manager.get_step_numbers() == []

    on_ranks(Size(1), place, act)
    assert place.list() == []


def test_what_may_be_done_while_a_checkpoint_is_open() -> None:
    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        transact(manager, 1, STATE)
        transact(manager, 2, STATE)
        manager.begin_checkpoint(2)
        equal(manager.load_last_checkpoint(), (2, STATE))
        manager.keep_last_n_checkpoints(1)
        assert manager.get_step_numbers() == [2]
        assert manager.load_metadata(2) is None
        manager.save_state({**STATE, "epoch": 6})
        manager.delete_checkpoint(2)
        assert not manager.has_checkpoint()
        manager.commit_checkpoint()
        equal(manager.load_checkpoint(2), {**STATE, "epoch": 6})

    on_ranks(Size(2), MemoryStorage(), act)


@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
def test_a_commit_in_the_background(kind: type) -> None:
    """What was given may be changed at once; the next begin waits until it is written."""
    place = kind()
    storages = [GatedStorage(place, on("put", "put_range", key="rank_")) for _ in range(2)]

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        state = state_of(gangs)
        manager.begin_checkpoint(1)
        manager.save_state(state)
        manager.save_score(0.5)
        pending = manager.commit_checkpoint(blocking=False)
        spoil(state)
        assert storages[gangs.root.rank].reached.wait(60)
        assert not pending.done()
        assert manager.get_step_numbers() == []
        with pytest.raises(TimeoutError):
            pending.result(timedelta(0))
        storages[gangs.root.rank].open_gate()
        manager.begin_checkpoint(2)
        assert pending.done()
        manager.save_state(state)
        manager.commit_checkpoint(blocking=False)
        equal(manager.load_checkpoint(1), state_of(gangs))
        info = pending.result()
        assert (info.step, info.world_size) == (1, 2)
        equal(manager.load_checkpoint(2), state)

    on_ranks(Size(2), lambda rank: storages[rank], act)


def spoil(state: Any) -> None:
    """Change all there is, in place."""
    for key, value in state.items():
        if isinstance(value, dict):
            spoil(value)
        elif isinstance(value, torch.Tensor):
            value.fill_(99)
        elif isinstance(value, list):
            value.clear()
        else:
            state[key] = None


@pytest.mark.parametrize("looked_at", [True, False])
def test_a_background_commit_that_fails(looked_at: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It comes up by `result()` on every rank, or in the log; the next one works."""
    place = MemoryStorage()

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        transact(manager, 1, state_of(gangs))
        manager.begin_checkpoint(2)
        manager.save_state({**state_of(gangs), "late": torch.ones(2)})
        pending = manager.commit_checkpoint(blocking=False)
        if looked_at:
            with pytest.raises(sc.CheckpointSaveError, match="rank 1: ConnectionResetError") as caught:
                pending.result()
            assert caught.value.step == 2
        manager.begin_checkpoint(2)
        assert manager.get_step_numbers() == [1]
        manager.save_state(state_of(gangs))
        manager.commit_checkpoint()

    with caplog.at_level(logging.ERROR):
        on_ranks(Size(2), lambda rank: FailingStorage(place, on("put", key="rank_1"), nth=2), act)
    assert ("step 2 was not saved" in caplog.text) == (not looked_at)
    assert place.list() == ["step_1/", "step_2/"]


def test_the_end_of_the_with_waits_for_a_background_commit() -> None:
    place = MemoryStorage()

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.begin_checkpoint(1)
        manager.save_state(state_of(gangs))
        manager.commit_checkpoint(blocking=False)

    on_ranks(Size(2), place, act)
    on_ranks(Size(2), place, lambda manager, gangs: equal(manager.load_checkpoint(1), state_of(gangs)))


class Telling(StorageWrapper):
    """Sets an event when something has been put under a key."""

    def __init__(self, inner: Storage, key: str, event: threading.Event) -> None:
        super().__init__(inner)
        self._key, self._event = key, event

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        result = call()
        if operation.name in ("put", "put_range") and operation.key.endswith(self._key):
            self._event.set()
        return result


def test_ranks_write_at_the_same_time() -> None:
    """fairseq2's ranks waited for rank 0's model before they wrote anything of their own."""
    place = MemoryStorage()
    first = GatedStorage(place, on("put", "put_range"))

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        state = state_of(gangs, {"model"})
        transact(manager, 1, state, replicated_keys={"model"})
        equal(manager.load_checkpoint(1), state)

    on_ranks(Size(2), lambda rank: first if rank == 0 else Telling(place, "rank_1.pt", first.gate), act)


@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
def test_data_parallel_ranks_share_the_writing(kind: type) -> None:
    """Of what they all hold alike each writes a part: ranges of one file, or one object each."""
    place = kind()
    storages = [RecordingStorage(place) for _ in range(2)]
    state = {"model": {"w": torch.arange(3.0 * (1 << 20))}, "optimizer": {"m": torch.ones(3 << 20)}}

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        transact(manager, 1, state, replicated_keys={"*"})
        equal(manager.load_checkpoint(1), state)

    on_ranks(Size(2), lambda rank: storages[rank], act)
    wrote = [names_put(storage.operations) - {"manifest.json"} for storage in storages]
    if kind is MemoryObjects:
        assert wrote == [{"model.pt"}, {"replicated.pt"}]
    else:
        assert wrote == [{"model.pt", "replicated.pt"}] * 2


def names_put(operations: Iterable[Operation]) -> set[str]:
    return {each.key.rpartition("/")[2] for each in operations if each.name in ("put", "put_range")}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_a_killed_job_left_is_no_checkpoint_in_nobodys_way_and_swept() -> None:
    place, clock = MemoryStorage(), Clock()
    left = ("step_2.0123456789abcdef0123.tmp", "step_9.fedcba98765432100000.tmp")
    for folder in left:
        for name in ("rank_0.pt", "model.pt"):
            place.put(f"{folder}/{name}", [b"half of it"])
    with local(place) as manager:
        manager._history._leftovers._clock = clock  # else nothing is swept for an hour
        assert manager.get_step_numbers() == []
        with pytest.raises(sc.CheckpointNotFoundError):
            manager.load_last_checkpoint()
        transact(manager, 2, STATE)
        equal(manager.load_last_checkpoint(), (2, STATE))
        assert place.list() == sorted(("step_2/", *(f"{folder}/" for folder in left)))
        manager._saver._thread.join()  # after the commit, what was left has been seen for the first time
        clock.now = timedelta(hours=3).total_seconds()
        transact(manager, 3, STATE)
    assert place.list() == ["step_2/", "step_3/"]
