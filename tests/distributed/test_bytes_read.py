"""A rank reads the bytes that it needs and hardly more, whatever the meshes: counted where they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardckpt as sc
from shardckpt.storage.open import open_storage
from shardckpt.testing.faults import CountingStorage
from tests.distributed.tensors import Grid, Placed, Split, Tensor, load, save

MIB = 1 << 20
BLOCKS = 3

FSDP, HSDP, TP, BOTH, DDP = "fsdp", "hsdp", "tp", "both", "ddp"
"""Ways in which a model lies on a mesh."""
LAYOUTS = [
    (BOTH, Grid((2, 2))),
    (FSDP, Grid((4, 1))),
    (TP, Grid((1, 4))),
    (HSDP, Grid((2, 2))),
    (DDP, Grid((4,))),
    (BOTH, Grid((2, 1))),
    (TP, Grid((1, 2))),
    (DDP, Grid((1,))),
]


def model(how: str, grid: Grid) -> list[Placed]:
    """68 MB as a transformer has them, with one moment for each weight, laid out as torch lays them out."""
    rows: Split | None
    columns: Split | None
    if how == BOTH:
        rows, columns, rest = Split((0, 0), from_the_right=True), Split((0, 1)), Split((0, None))
    elif how == TP:
        rows, columns, rest = Split((None, 0), on_tp_alone=True), Split((None, 1), on_tp_alone=True), None
    else:
        rows = columns = rest = {FSDP: Split((0, None)), HSDP: Split((None, 0)), DDP: None}[how]
    tensors = [Placed(Tensor("words", (2051, 512)), rest), Placed(Tensor("steps", (), torch.float32), None)]
    for block in range(BLOCKS):
        for part in ("weight", "moment"):
            tensors += [
                Placed(Tensor(f"{block}.up.{part}", (2730, 512)), rows),
                Placed(Tensor(f"{block}.down.{part}", (512, 2730)), columns),
                Placed(Tensor(f"{block}.norm.{part}", (512,)), rest),
            ]
    return tensors


def save_all(rank: int, world_size: int, folder: Path, root: Path, layouts: list[tuple[str, Grid]]) -> None:
    for number, (how, grid) in enumerate(layouts):
        save(root / str(number), grid, model(how, grid))


def load_all(
    rank: int, world_size: int, folder: Path, roots: list[Path], layouts: list[tuple[str, Grid]]
) -> dict[tuple[str, str], tuple[int, int]]:
    """(bytes needed, bytes read) by run and layout."""
    found = {}
    for root in roots:
        for how, grid in layouts:
            mesh, placed = grid.mesh(), model(how, grid)
            at = (tuple(mesh.shape), tuple(mesh.get_coordinate() or ()))
            needed = sum(
                item.tensor.dtype.itemsize
                * item.split.local(torch.empty(item.tensor.shape, device="meta"), *at).numel()
                if item.split is not None
                else item.tensor.nbytes
                for item in placed
            )
            storage = CountingStorage(open_storage(root))
            with sc.CheckpointManager(storage, sc.Gangs.from_mesh(mesh)) as manager:
                assert load(manager, mesh, placed) == []
            found[root.name, f"{how} {grid.shape}"] = (needed, storage.total_nbytes)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [4, 2, 1])
@pytest.mark.sampled(2)
def test_bytes_read_are_the_bytes_needed(ranks, tmp_path, world_size):
    """From the first layout to all, and from the next two to the first of each number of ranks."""
    saved = [layout for layout in LAYOUTS if layout[1].ranks == 4][:3]
    layouts = [layout for layout in LAYOUTS if layout[1].ranks == world_size]
    ranks.run(4, save_all, tmp_path, saved)
    first, *others = [tmp_path / str(number) for number in range(len(saved))]
    for roots, targets in (([first], layouts), (others, layouts[:1])):
        for found in ranks.run(world_size, load_all, roots, targets):
            assert len(found) == len(roots) * len(targets)
            for journey, (needed, read) in found.items():
                assert needed >= 64 * MIB // 4
                assert needed <= read <= 1.02 * needed + MIB, journey
