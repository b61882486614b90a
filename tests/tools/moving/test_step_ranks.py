"""Steps of real ranks, on any mesh and in any placement, as one process sees them: bit for bit the whole tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

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
            assert dict(source.ties) == {"model.head.weight": "model.words.weight"}
        found = {f"model {name}": value for name, value in tree["model"].items()}
        for name, values in tree["optimizer"]["state"].items():
            found |= {f"moment {name} {key}": value for key, value in values.items()}
        tensors = {name for name, value in expected.items() if isinstance(value, torch.Tensor)}
        assert found.keys() == tensors
        assert [name for name in tensors if not same_bits(found[name], expected[name])] == []
        assert tree["scheduler"] == expected["scheduler"]
        assert tree["progress"] == expected["progress"]


def save_tied(rank: int, world_size: int, folder: Path, root: Path, rows: int) -> None:
    """Two tied pairs with something of another size before, between and after them, sharded over pairs of ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    with checkpoints(root, mesh) as manager:
        torch.manual_seed(3)
        names = ("first", "a", "b", "c", "tied to a", "last", "tied to b")
        sizes = (5, rows, rows, 7, rows, 3, rows)
        lots = {
            name: distribute_tensor(torch.randn(size, 3), mesh, (Replicate(), Shard(0)))
            for name, size in zip(names, sizes, strict=True)
        }
        lots |= {"tied to a": lots["a"], "tied to b": lots["b"]}
        manager.save(1, {"model": lots}).result()
        fresh = {name: torch.zeros_like(tensor) for name, tensor in lots.items()}
        manager.load(1, {"model": fresh})
        assert all(torch.equal(fresh[name].full_tensor(), lots[name].full_tensor()) for name in names)


@pytest.mark.parametrize(("rows", "tied"), [(2, True), (1, False)])
def test_ties_of_what_several_ranks_hold_are_kept(ranks, tmp_path, rows, tied):
    """Where a rank holds nothing of them it cannot see that they are tied: then all ranks store them twice."""
    ranks.run(4, save_tied, tmp_path, rows)
    with StepSource.open(tmp_path) as source:
        ties = {f"model.tied to {name}": f"model.{name}" for name in "ab"}
        assert dict(source.ties) == (ties if tied else {})
        found = {name: whole_of(source, f"model.{name}") for name in ("a", "tied to a")} if not tied else {}
    assert not found or same_bits(found["a"], found["tied to a"])
