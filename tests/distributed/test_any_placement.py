"""Random tensors, placed at random on a random mesh, load on any other: bit for bit what they were as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.distributed.tensors import Grid, Placed, Split, Tensor, checkpoints, load, save

GRIDS = [Grid(shape) for shape in [(1,), (2,), (3,), (4,), (1, 2), (2, 1), (2, 2), (4, 1), (1, 4), (1, 3), (2, 1, 2)]]
DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.bool, torch.int8, torch.int64, torch.uint16),
    *(torch.complex64, torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2),
]
shapes = st.lists(st.one_of(st.integers(0, 9), st.sampled_from([1, 4, 8])), min_size=0, max_size=4).map(tuple)


@st.composite
def splits(draw: st.DrawFn, grid: Grid, tensor: Tensor) -> Split | None:
    if draw(st.integers(0, 5)) == 0:
        return None
    dims = [None, *range(len(tensor.shape))]
    cuts = tuple(draw(st.sampled_from(dims)) for _ in grid.shape)
    alone = len(cuts) > 1 and cuts[:-1] == (None,) * (len(cuts) - 1) and draw(st.booleans())
    return Split(cuts, from_the_right=draw(st.booleans()), on_tp_alone=alone)


@st.composite
def journeys(draw: st.DrawFn) -> tuple[Grid, list[Placed], Grid, list[Placed], str]:
    """(grid, tensors) for the save, the same tensors on another grid for the load, and the key that they lie under."""
    here, there = draw(st.sampled_from(GRIDS)), draw(st.sampled_from(GRIDS))
    count = draw(st.integers(1, 8))
    tensors = [Tensor(f"t{i}", draw(shapes), draw(st.sampled_from(DTYPES))) for i in range(count)]
    before = [Placed(tensor, draw(splits(here, tensor))) for tensor in tensors]
    after = [Placed(tensor, draw(splits(there, tensor))) for tensor in tensors]
    return here, before, there, after, draw(st.sampled_from(["model", "weights"]))


THIN = [Tensor("thin", (1, 3)), Tensor("none", (0,))]
SHARDS_WITHOUT_ELEMENTS = (
    *(Grid((2, 2)), [Placed(tensor, Split((None, 0), on_tp_alone=True)) for tensor in THIN]),
    *(Grid((4,)), [Placed(tensor, Split((0,))) for tensor in THIN]),
    "model",
)


def save_on(rank: int, world_size: int, folder: Path, root: Path, grid: Grid, placed: list[Placed], key: str) -> None:
    save(root, grid, placed, key=key)


def load_on(
    rank: int, world_size: int, folder: Path, root: Path, grid: Grid, placed: list[Placed], key: str
) -> list[str]:
    mesh = grid.mesh()
    with checkpoints(root, mesh) as manager:
        return load(manager, mesh, placed, key=key)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whatever_was_saved_anywhere_is_loaded_anywhere(ranks, tmp_path):
    folders = (tmp_path / str(number) for number in range(10**9))

    @example(SHARDS_WITHOUT_ELEMENTS)
    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(journeys())
    def travel(journey):
        here, before, there, after, key = journey
        root = next(folders)
        ranks.run(here.ranks, save_on, root, here, before, key)
        assert ranks.run(there.ranks, load_on, root, there, after, key) == [[]] * there.ranks

    travel()
