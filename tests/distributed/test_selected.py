"""Loads of some of a sharded state, by other names, on another mesh; and the dry run of them. Ranks are processes."""

from __future__ import annotations

from pathlib import Path

import torch

import shardckpt as sc
from tests.distributed.jobs import Job, Layout, checkpoints, differences

SAVED, LOADED = Layout(2), Layout(1, 2)
"""FSDP2, and tensor parallelism."""


def select(rank: int, world_size: int, folder: Path, root: Path) -> tuple[list[str], sc.LoadPlan, int]:
    """What is wrong after a load, the plan of it, and the bytes of tensors that this rank has of what was loaded."""
    job, other = Job(SAVED, seed=0), Job(LOADED, seed=5)
    job.train_step()
    with checkpoints(root, job.mesh) as manager:
        manager.save(1, job.state()).result()
    saved, before = job.gathered(), other.gathered()
    state = {"net": other.module, "optimizer": other.optimizer, "progress": other.progress}
    policy = sc.LoadPolicy(
        include=["net", "progress.step"], exclude=["net.blocks.1", "net.seen"], rename={"net": "model"}
    )
    with checkpoints(root, other.mesh) as manager:
        plan = manager.plan(1, state, policy=policy)
        problems = [f"the dry run changed {key}" for key in differences(before, other.gathered())]
        manager.load(1, state, policy=policy)
    after = other.gathered()
    for key in after:
        kept = not key.startswith("model ") or "blocks.1" in key or key == "model seen"
        expected = before if kept else saved
        if key != "progress" and list(differences({key: after[key]}, {key: expected[key]})):
            problems.append(key)
    own = {name: getattr(value, "_local_tensor", value) for name, value in other.module.state_dict().items()}
    own.pop("head.weight")  # the words'; read twice, as two names of one
    taken = {name: value for name, value in own.items() if "blocks.1" not in name and name != "seen"}
    problems += [] if (other.progress["step"], other.progress["losses"]) == (1, []) else ["progress"]
    return problems, plan, sum(value.nbytes for value in taken.values()) + own["words.weight"].nbytes


def test_some_of_a_sharded_model_on_another_mesh(ranks, tmp_path):
    (wrong, plan, nbytes), (other_wrong, other_plan, other_nbytes) = ranks.run(2, select, tmp_path / "run")
    assert wrong == other_wrong == []
    assert plan == other_plan
    assert [rank.nbytes for rank in plan.ranks] == [nbytes, other_nbytes]
    assert {"rank_0.pt", "rank_1.pt"} <= {file.file for rank in plan.ranks for file in rank.files}
    assert plan.left["optimizer"] == plan.left["net.blocks.1.up.weight"]
    assert {"net.blocks.0.up.weight", "net.mean", "progress.step"} <= set(plan.changed)
    assert {"model.blocks.1.up.weight", "model.seen", "rng.torch"} <= set(plan.dropped)
    assert torch.float32.itemsize * 41 * 20 < nbytes < plan.stored_nbytes
