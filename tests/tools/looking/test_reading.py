"""The plan without a job: what it says of another mesh is what a job there plans, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import shardckpt as sc
from shardckpt.format.manifest import MeshEntry
from shardckpt.run.catalog import Catalog
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.faults import CountingStorage
from shardckpt.testing.gangs import run_ranks
from shardckpt.tools.looking.reading import plan_reading, saved_mesh
from tests.distributed.jobs import Job, Layout, Net, checkpoints
from tests.tools.making import save


def save_and_plan(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> sc.LoadPlan:
    job = Job(layout, seed=0)
    job.train_step()
    with checkpoints(root, job.mesh) as manager:
        manager.save(1, job.state()).result()
        return manager.plan(1, {"model": job.module, "optimizer": job.optimizer})


def test_it_plans_what_a_job_plans(ranks, tmp_path):
    """FSDP2 over tensor parallelism, whose shards lie as one first cuts for the one and then for the other."""
    job = ranks.run(4, save_and_plan, tmp_path, Layout(2, 2))[0]
    assert job.fits
    found = plan_reading(tmp_path, {"dp": 2, "tp": 2}, include=["model", "optimizer"])
    assert found.own == ()
    assert plan_reading(tmp_path, include=["model", "optimizer"]) == found  # that on which it was saved
    for ours, theirs in zip(found.plan.ranks, job.ranks, strict=True):
        tensors, expected = ({f.file: f for f in reads.files if f.nbytes} for reads in (ours, theirs))
        assert tensors == expected
        assert (ours.nbytes, ours.index_nbytes) == (theirs.nbytes, theirs.index_nbytes)
    assert found.plan.stored_nbytes == job.stored_nbytes
    assert {key.split(".")[0] for key in found.plan.dropped} == {"scheduler", "progress", "rng"}
    others = plan_reading(tmp_path, {"dp": 3}, include=["model.blocks"])
    whole = sum(value.nbytes for name, value in Net().state_dict().items() if name.startswith("blocks"))
    assert others.plan.nbytes == whole
    assert plan_reading(tmp_path, {"replicate": 2, "shard": 3}, include=["model.blocks"]).plan.nbytes == 2 * whole


def test_what_was_never_cut_is_cut_evenly() -> None:
    storage = MemoryStorage("run")
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(1, {"model": {"w": torch.zeros(10, 3), "scale": torch.zeros(())}, "lr": 1.0}).result()
    counting = CountingStorage(storage)
    found = plan_reading(counting, {"dp": 4})
    assert set(counting.nbytes) == {"step_1/manifest.json"}
    assert [rank.nbytes for rank in found.plan.ranks] == [40, 40, 40, 16]  # 3, 3, 3 and 1 rows
    assert [rank.ranges for rank in found.plan.ranks] == [2] * 4
    assert found.plan.changed == ("lr", "model.scale", "model.w")
    assert plan_reading(storage, {"dp": 4}, exclude=["model.w"]).plan.nbytes == 16


def test_the_mesh_of_a_step_without_a_device_mesh_is_data_x_tensor_parallel() -> None:
    storage = MemoryStorage()
    save(storage, 1)
    assert plan_reading(storage).mesh == {"dp": 1}
    record = Catalog(storage).record(1)[1]
    assert saved_mesh(replace(record, shard_of=(0, 0, 0))) == {"dp": 3}
    assert saved_mesh(replace(record, shard_of=(0, 1, 0, 1, 0, 1))) == {"dp": 3, "tp": 2}
    part, whole = MeshEntry(("dp",), (2,), (0, 2)), MeshEntry(("a", "b"), (2, 2), (0, 1, 2, 3))
    assert saved_mesh(replace(record, shard_of=(0, 0, 1, 1), meshes=(part, whole))) == {"a": 2, "b": 2}


def test_what_only_single_ranks_have_is_told() -> None:
    storage = MemoryStorage("run")

    def act(gangs: sc.Gangs) -> None:
        with sc.CheckpointManager(storage, gangs) as manager:
            manager.save(1, {"model": {"w": torch.zeros(8)}, "seed": gangs.root.rank}, replicated=["model"]).result()

    run_ranks(2, act)
    assert plan_reading(storage, {"dp": 2}).own == ()
    assert plan_reading(storage, {"dp": 3}).own == ("seed",)


@pytest.mark.parametrize("mesh", [{}, {"dp": 0}, {"pp": 2}, {"dp": 1 << 20}])
def test_meshes_of_which_nothing_can_be_said(mesh: dict[str, int]) -> None:
    storage = MemoryStorage()
    save(storage, 1)
    with pytest.raises(ValueError, match="a mesh has dimensions"):
        plan_reading(storage, mesh)
    plan = plan_reading(storage, {"dp": 1}, include=["nothing.*"]).plan
    assert plan.problems[0] == "include: 'nothing.*' matches no key of the state"
