"""Steps of real ranks, on any mesh and in any placement, as one process sees them: bit for bit the whole tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from shardckpt.tools.moving.step import StepSource
from tests.distributed.jobs import Job, Layout, checkpoints, keep_reference
from tests.distributed.tensors import Grid, Placed, Split, Tensor, same_bits, save
from tests.tools.moving.reading_whole import nested_of, whole_of

FSDP_TP = (
    Grid((2, 2)),
    [
        Placed(Tensor("rows", (9, 6)), Split((0, None))),
        Placed(Tensor("columns", (7, 10), torch.bfloat16), Split((None, 1))),
        Placed(Tensor("both", (9, 7), torch.float64), Split((0, 1))),
        Placed(Tensor("strided", (9, 5), torch.uint8), Split((0, 0), from_the_right=True)),
        Placed(Tensor("thin", (1, 3)), Split((0, 0))),
        Placed(Tensor("none", (0, 4)), Split((0, None))),
        Placed(Tensor("deep", (3, 5, 4, 2), torch.float8_e4m3fn), Split((2, 1))),
        Placed(Tensor("one", (), torch.bool), Split((None, None))),
        Placed(Tensor("plain", (11,), torch.int64), None),
    ],
)


def save_placed(rank: int, world_size: int, folder: Path, root: Path, grid: Grid, placed: list[Placed]) -> None:
    save(root, grid, placed)


def save_job(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> None:
    job = Job(layout, seed=5)
    job.train_step()
    with checkpoints(root / "run", job.mesh) as manager:
        manager.save(1, job.state()).result()
    keep_reference(root / "reference.pt", job.gathered())


def test_every_placement_is_put_together(ranks, tmp_path):
    grid, placed = FSDP_TP
    ranks.run(grid.ranks, save_placed, tmp_path, grid, placed)
    for window in (None, 7):
        with StepSource.open(tmp_path) as source:
            assert list(source.tensors) == [f"model.{item.tensor.name}" for item in placed]
            for item in placed:
                found = whole_of(source, f"model.{item.tensor.name}", window=window)
                assert same_bits(found, item.tensor.content()), item.tensor.name


def test_a_whole_job_of_fsdp2_and_tp_comes_out_as_torch_gathers_it(ranks, tmp_path):
    for layout in (Layout(2, 2), Layout(4, 1, "hsdp")):
        root = tmp_path / str(layout)
        ranks.run(layout.ranks, save_job, root, layout)
        expected = torch.load(root / "reference.pt", weights_only=False)
        with StepSource.open(root / "run") as source:
            tree = nested_of(source)
            assert source.differ == ()
        found = {f"model {name}": value for name, value in tree["model"].items()}
        for name, values in tree["optimizer"]["state"].items():
            found |= {f"moment {name} {key}": value for key, value in values.items()}
        tensors = {name for name, value in expected.items() if isinstance(value, torch.Tensor)}
        assert found.keys() == tensors
        assert [name for name in tensors if not same_bits(found[name], expected[name])] == []
        assert tree["scheduler"] == expected["scheduler"]
        assert tree["progress"] == expected["progress"]
