"""The dry run of a load: it says what `load` then does, reads nothing but the record, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.faults import CountingStorage, RecordingStorage
from shardckpt.testing.gangs import run_ranks
from tests.engine.states import assert_same, snapshot, train, training


def test_it_says_what_a_load_then_does() -> None:
    storage, one, other = MemoryObjects("run"), training(), training(seed=5)
    train(one, 1)
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(3, one).result()
    counting = CountingStorage(storage)
    policy = sc.LoadPolicy(include=["model", "optimizer", "progress.step"])
    with sc.CheckpointManager(counting) as checkpoints:
        before = snapshot(other)
        plan = checkpoints.plan(3, other, policy=policy)
        assert not [key for key in counting.nbytes if key.endswith(".pt")]
        assert not other["optimizer"].state
        assert_same(before, snapshot(other))
        info = checkpoints.load(3, other, policy=policy)
    assert plan.fits
    assert plan.left == info.left
    assert plan.url == info.url
    assert {"optimizer", "progress.step", "model.embed.weight", "model.norm.num_batches_tracked"} <= set(plan.changed)
    assert {"rng.python", "scheduler.last_epoch", "counter.histogram", "progress.losses"} <= set(plan.dropped)
    (reads,) = plan.ranks
    assert {file.file.rpartition("/")[2] for file in reads.files} == {"model.pt", "rank_0.pt"}
    tensors = [*one["model"].state_dict().values()]
    tensors += [value for state in one["optimizer"].state.values() for value in state.values()]
    assert plan.nbytes == sum(tensor.nbytes for tensor in tensors)
    read = sum(nbytes for key, nbytes in counting.nbytes.items() if key.endswith(".pt"))
    assert plan.nbytes + reads.index_nbytes < read < plan.nbytes + reads.index_nbytes + 100_000
    assert plan.stored_nbytes == info.nbytes


def test_it_lists_every_difference_and_raises_none() -> None:
    storage = MemoryStorage("run")
    saved = {"model": {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3), "d": torch.ones(3)}, "lr": 1.0}
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(1, saved).result()
        wanted: dict[str, Any] = {"a": torch.zeros(3), "b": torch.zeros(4), "c": torch.zeros(3).int(), "e": 1}
        plan = checkpoints.plan(1, {"model": wanted})
        with pytest.raises(sc.CheckpointMismatchError) as caught:
            checkpoints.load(1, {"model": wanted})
        assert plan.problems == caught.value.problems
        assert [problem.split(":")[0] for problem in plan.problems] == ["shape", "dtype", "missing", "unexpected"]
        assert (plan.changed, plan.dropped, plan.fits) == (("model.a",), ("lr", "model.b", "model.c", "model.d"), False)
        kept = checkpoints.plan(
            1, {"model": wanted}, policy=sc.LoadPolicy("keep", "ignore", shape="keep", dtype="cast")
        )
        assert kept.problems == ()
        assert kept.left == {"model.b": "of another shape in the checkpoint", "model.e": "not in the checkpoint"}
        assert not wanted["a"].any()
        with pytest.raises(sc.CheckpointNotFoundError):
            checkpoints.plan(2, {"model": wanted})


def test_all_ranks_are_told_the_same_and_each_is_in_it() -> None:
    storage = MemoryStorage("run")

    def save(gangs: sc.Gangs) -> None:
        rank = gangs.root.rank
        with sc.CheckpointManager(storage, gangs) as manager:
            state = {"model": {"w": torch.ones(100)}, "own": {f"of_{rank}": torch.ones(rank + 1)}}
            manager.save(1, state, replicated=["model"]).result()

    def plan(gangs: sc.Gangs) -> sc.LoadPlan:
        rank, recording = gangs.root.rank, RecordingStorage(storage)
        with sc.CheckpointManager(recording, gangs) as manager:
            state = {"model": {"w": torch.zeros(100)}, "own": {f"of_{rank}": torch.zeros(rank + 1)}}
            found = manager.plan(1, state)
        assert not [op for op in recording.operations if any(key.endswith(".pt") for key in op.keys)]
        return found

    run_ranks(2, save)
    one, other = run_ranks(2, plan)
    assert one == other
    assert [rank.nbytes for rank in one.ranks] == [404, 408]
    assert [[file.file for file in rank.files] for rank in one.ranks] == [["model.pt", f"rank_{r}.pt"] for r in (0, 1)]
    assert one.changed == ("model.w", "own.of_0", "own.of_1")
    assert (one.left, one.dropped, one.problems) == ({}, (), ())
