"""A state saved on one mesh loads on any other, bit for bit: parameters, buffers, AdamW, schedule, plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.distributed.jobs import Job, Layout, checkpoints, differences, keep_reference

FIRST = Layout(2, 2)
LAYOUTS = [
    FIRST,
    Layout(4),
    Layout(1, 4),
    Layout(2, 2, "copies"),
    Layout(4, 1, "ddp"),
    Layout(4, 1, "hsdp"),
    Layout(2),
    Layout(1, 2),
    Layout(2, 1, "ddp"),
    Layout(1),
]
FEWER = [FIRST, Layout(1, 4), Layout(4, 1, "ddp"), Layout(4, 1, "hsdp"), Layout(1)]


def train_and_save(rank: int, world_size: int, folder: Path, root: Path, dtype: torch.dtype) -> None:
    """On four ranks: two steps and a save; all of the state, as torch gathers it, lies beside the run."""
    job = Job(FIRST, seed=0, dtype=dtype)
    for _ in range(2):
        job.train_step()
    with checkpoints(root / "first", job.mesh) as manager:
        manager.save(2, job.state()).result()
    keep_reference(root / "reference.pt", job.gathered())


def load_and_save_again(
    rank: int, world_size: int, folder: Path, root: Path, layouts: Sequence[Layout], dtype: torch.dtype
) -> list[float]:
    """Load the first run on each of these meshes and save it there as a run of its own; gives the next losses."""
    losses = []
    for layout in layouts:
        job = Job(layout, seed=1, dtype=dtype)
        check_load(root / "first", job, root / "reference.pt")
        with checkpoints(root / "again" / str(layout), job.mesh) as manager:
            manager.save(3, job.state()).result()
        losses.append(job.train_step())
    return losses


def load_those_saved_again(
    rank: int, world_size: int, folder: Path, root: Path, layouts: Sequence[Layout], dtype: torch.dtype
) -> int:
    """Load what the other meshes saved; on these meshes in turn, and always on the first. How many loads there were."""
    runs = sorted((root / "again").iterdir())
    targets = [(run, layouts[i % len(layouts)]) for i, run in enumerate(runs)] + [(run, layouts[0]) for run in runs]
    for run, layout in dict.fromkeys(targets):
        check_load(run, Job(layout, seed=2, dtype=dtype), root / "reference.pt")
    return len(set(targets))


def check_load(run: Path, job: Job, reference: Path) -> None:
    with checkpoints(run, job.mesh) as manager:
        assert manager.resume(job.state()) is not None
    different = list(differences(torch.load(reference, weights_only=True), job.gathered()))
    assert not different, f"{run.name} loaded on {job.layout}: {different}"
    assert job.model.head.weight is job.model.words.weight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layouts"), [(torch.bfloat16, FEWER), pytest.param(torch.float32, LAYOUTS, marks=pytest.mark.larger)]
)
def test_every_mesh_to_every_other(ranks, tmp_path, dtype, layouts):
    """Out from the first mesh to each, and from each back to it, to one process, and to one more in turn."""
    ranks.run(4, train_and_save, tmp_path, dtype)
    losses: dict[str, set[float]] = {}
    for world_size in (4, 2, 1):
        here = [layout for layout in layouts if layout.ranks == world_size]
        for by_layout in ranks.run(world_size, load_and_save_again, tmp_path, here, dtype) if here else ():
            for layout, loss in zip(here, by_layout, strict=True):
                losses.setdefault(str(layout), set()).add(loss)
    assert len(losses) == len(layouts)
    every = [loss for found in losses.values() for loss in found]
    assert max(every) - min(every) <= (1e-6 if dtype == torch.float32 else 1e-2), losses
    for world_size in (4, 1):
        here = [layout for layout in layouts if layout.ranks == world_size]
        assert ranks.run(world_size, load_those_saved_again, tmp_path, here, dtype)[0] >= len(layouts)
