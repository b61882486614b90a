"""A frozen base that lies on a mesh: each rank's part of it is stored once, and goes to any other mesh."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from shardckpt.format.layout import BLOBS
from tests.distributed.jobs import Job, Layout, checkpoints, keep_reference
from tests.distributed.test_meshes import check_load

STEPS = 3


def tuned(layout: Layout, *, seed: int) -> Job:
    """A job that trains the norms and nothing else."""
    job = Job(layout, seed=seed)
    for name, parameter in job.module.named_parameters():
        parameter.requires_grad_("norm" in name)
    if layout.data == "ddp":
        job.module = nn.parallel.DistributedDataParallel(job.model)  # it must know of it from the start
    job.optimizer = torch.optim.AdamW([p for p in job.module.parameters() if p.requires_grad], lr=1e-2, foreach=False)
    job.scheduler = torch.optim.lr_scheduler.StepLR(job.optimizer, step_size=1, gamma=0.9)
    return job


def blobs(root: Path) -> list[Path]:
    return sorted((root / BLOBS).rglob("*.pt"))


def train_and_save(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> list[str]:
    """Save each step; gives the names of the blobs, which are those of the first step."""
    job, first = tuned(layout, seed=0), list[Path]()
    with checkpoints(root / "run", job.mesh) as manager:
        for step in range(1, STEPS + 1):
            job.train_step()
            manager.save(step, job.state(), frozen=("*",)).result()
            manager.steps()  # all ranks are here
            first = first or blobs(root / "run")
            assert blobs(root / "run") == first
    keep_reference(root / "reference.pt", job.gathered())
    return [path.name for path in first]


def load(rank: int, world_size: int, folder: Path, root: Path, layouts: list[Layout]) -> None:
    for layout in layouts:
        check_load(root / "run", tuned(layout, seed=1), root / "reference.pt")


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (Layout(2, 1, "ddp"), ["frozen.pt"]),
        (Layout(4, 1, "hsdp"), [f"frozen_rank_{rank}.pt" for rank in range(4)]),
        (Layout(2, 2), [f"frozen_rank_{rank}.pt" for rank in range(4)]),
    ],
    ids=["ddp", "hsdp", "fsdp2 x tp"],
)
@pytest.mark.sampled(2)
def test_a_frozen_base_on_a_mesh(ranks, tmp_path, layout, names):
    stored = ranks.run(layout.ranks, train_and_save, tmp_path, layout)[0]
    assert sorted(stored) == names
    ranks.run(2, load, tmp_path, [Layout(2), Layout(1, 2)])
    ranks.run(1, load, tmp_path, [Layout(1)])
