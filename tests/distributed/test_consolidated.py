"""The consolidated file holds the whole model, bit for bit, however it lies on the ranks; and no rank gathers it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import shardckpt as sc
from shardckpt.storage.base import Buffer
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.pool import RankLostError
from tests.distributed.consolidation import assert_same, consolidate, consolidate_and_read, gangs_here, operations
from tests.distributed.jobs import Job, Layout, Net, full
from tests.distributed.tensors import Grid, Placed, Split, Tensor, same_bits, view_of
from tests.distributed.test_any_placement import DTYPES, GRIDS, shapes, splits
from tests.distributed.test_pipeline import LAYERS, Stages, stage_of

LAYOUTS = [
    Layout(2, 2),
    Layout(4),
    Layout(1, 4),
    Layout(4, 1, "hsdp"),
    Layout(4, 1, "ddp"),
    Layout(2, 2, "copies"),
    Layout(2),
    Layout(1, 2),
    Layout(1),
]


def unsharded(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: value.clone() for name, value in Net(dtype).state_dict().items()}


def write_jobs(rank: int, world_size: int, folder: Path, layouts: list[Layout], dtype: torch.dtype) -> int:
    """Each layout before its first step, against the model that was never sharded, and after one, against torch's."""
    for layout in layouts:
        job = Job(layout, seed=3, dtype=dtype)
        found = consolidate_and_read(folder / f"new_{layout}", job.module)
        assert_same(found, unsharded(3, dtype))
        assert found["head.weight"].data_ptr() == found["words.weight"].data_ptr()
        job.train_step()
        gathered = {name: full(value) for name, value in get_model_state_dict(job.module).items()}
        assert_same(consolidate_and_read(folder / f"trained_{layout}", job.module), gathered)
    return len(layouts)


@pytest.mark.parametrize("world_size", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.larger)])
def test_every_layout_gives_the_unsharded_model(ranks, world_size, dtype):
    layouts = [layout for layout in LAYOUTS if layout.ranks == world_size]
    assert set(ranks.run(world_size, write_jobs, layouts, dtype)) == {len(layouts)}


@st.composite
def placements(draw: st.DrawFn) -> tuple[Grid, list[Placed]]:
    grid = draw(st.sampled_from(GRIDS))
    tensors = [Tensor(f"t{i}", draw(shapes), draw(st.sampled_from(DTYPES))) for i in range(draw(st.integers(1, 8)))]
    return grid, [Placed(tensor, draw(splits(grid, tensor))) for tensor in tensors]


class Holder(nn.Module):
    """A model of bare tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def write_placed(rank: int, world_size: int, folder: Path, grid: Grid, placed: list[Placed]) -> list[str]:
    mesh = grid.mesh()
    model = Holder({item.tensor.name: view_of(item.tensor.content(), item.split, mesh) for item in placed})
    found = consolidate_and_read(folder, model)
    assert list(found) == [item.tensor.name for item in placed]
    return [item.tensor.name for item in placed if not same_bits(found[item.tensor.name], item.tensor.content())]


@pytest.mark.slow
@given(case=placements())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_placement_of_any_tensor(ranks, case):
    grid, placed = case
    for wrong in ranks.run(grid.ranks, write_placed, grid, placed):
        assert not wrong


LARGE = [(5, 700_001), (3, 2, 300_007), (1_300_001,), (130_000, 9), (257, 4, 1100), (2, 999_983)]


@pytest.mark.parametrize("from_the_right", [False, True])
@pytest.mark.sampled(2)
def test_tensors_of_many_windows(ranks, from_the_right):
    """Larger than a window, cut along each dimension, rows longer and much shorter than a window, off all bounds."""
    grid = Grid((2, 2))
    placed = []
    for number, shape in enumerate(LARGE):
        dims = [None, *range(len(shape))]
        cuts = [(a, b) for a in dims for b in dims if (a, b) != (None, None)][:: 2 if from_the_right else 1]
        for cut in cuts:
            tensor = Tensor(f"t{number}_{cut[0]}_{cut[1]}", shape, [torch.float32, torch.bfloat16][number % 2])
            placed.append(Placed(tensor, Split(cut, from_the_right=from_the_right)))
    for wrong in ranks.run(4, write_placed, grid, placed):
        assert not wrong


def count_operations(rank: int, world_size: int, folder: Path) -> list[dict[str, int]]:
    pair = dist.new_group([0, 1])
    counts = [operations()]
    dist.all_reduce(torch.ones(1), group=pair)
    counts.append(operations())
    dist.barrier()
    return [*counts, operations()]


def test_operations_of_the_training_would_be_counted(ranks):
    """The control of `without_collectives`, which all of these tests run under."""
    for before, between, after in ranks.run(2, count_operations):
        assert len(before) == 2
        assert sum(before.values()) < sum(between.values()) < sum(after.values())


def write_stage(rank: int, world_size: int, folder: Path, shape: Stages) -> None:
    """Every stage has other layers; the file has them all."""
    model, _, mesh = stage_of(shape, 4)
    torch.manual_seed(4)
    expected = nn.Sequential(*(nn.Linear(5, 5) for _ in range(LAYERS))).state_dict()
    found = consolidate_and_read(folder, model)
    assert_same(found, expected)
    assert list(found) == list(expected)
    assert mesh["pp"].size() == shape[0]


@pytest.mark.parametrize("shape", [(2, 1), (4, 1), (2, 2)], ids=str)
def test_all_stages_of_a_pipeline_are_in_one_file(ranks, shape):
    ranks.run(shape[0] * shape[1], write_stage, shape)


def write_different(rank: int, world_size: int, folder: Path, what: str) -> tuple[str, list[str]]:
    """Something that the whole model has but one of is not the same on rank 1."""
    job = Job(Layout(2, 2), seed=0)
    parameters = dict(job.module.named_parameters())
    with torch.no_grad():
        if rank == 1 and what == "buffer":
            job.model.mean += 1
        elif rank == 1 and what == "assumed copy":
            parameters["blocks.0.norm.weight"].to_local().add_(1)
        elif rank == 1 and what == "shape":
            job.model.register_buffer("mean", torch.zeros(3))
    (folder / "step_1").mkdir(exist_ok=True)
    with gangs_here() as gangs:
        try:
            consolidate(folder, gangs, job.module)
        except sc.CheckpointError as error:
            dist.barrier()
            return str(error), [path.name for path in (folder / "step_1").iterdir()]
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("buffer", r"different values of .*model.mean \(for example ranks 0 and 1\)\. Bring"),
        ("assumed copy", r"different values of .*model.blocks.0.norm.weight \(for example ranks 0 and 1\)"),
        ("shape", "model.mean is not the same on all ranks: float32.* and float64"),
    ],
)
def test_copies_that_differ_are_not_lost(ranks, what, said):
    outcomes = ranks.run(4, write_different, what)
    for error, left in outcomes:
        assert re.search(said, error), error
        assert not left
    assert len({error.partition("\n")[0] for error, _ in outcomes}) == 1


def write_plain_parts(rank: int, world_size: int, folder: Path) -> str:
    """Tensor parallelism by hand: each rank has a plain tensor of its own under one name."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, float(rank))
    nn.init.zeros_(model.bias)
    with gangs_here() as gangs, pytest.raises(sc.CheckpointError) as caught:
        consolidate(folder, gangs, model)
    return str(caught.value)


def test_parts_that_do_not_say_so_are_refused(ranks):
    for error in ranks.run(2, write_plain_parts):
        assert re.search("different values of .*model.weight .*make it a DTensor", error)
        assert "model.bias" not in error


class DyingStorage(StorageWrapper):
    """The process ends in the middle of its put."""

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        os._exit(7)


def write_and_die(rank: int, world_size: int, folder: Path) -> tuple[str, list[str]]:
    job = Job(Layout(3), seed=0)
    place = LocalStorage(folder)
    with gangs_here() as gangs:
        try:
            consolidate(DyingStorage(place) if rank == 1 else place, gangs, job.module, timeout=timedelta(seconds=10))
        except sc.GangError as error:
            return str(error), [path.name for path in (folder / "step_1").iterdir() if path.name == "model.pt"]
    return "nothing was raised", []


def test_a_rank_that_dies_is_noticed(ranks):
    outcomes = ranks.run_settled(3, write_and_die, timeout=50)
    assert isinstance(outcomes[1].error, RankLostError)
    for rank in (0, 2):
        error, left = outcomes[rank].value
        assert re.search("write parts of step 1 failed.* rank 1", error), error
        assert not left
