"""Our boxes against torch's own splitting, FSDP2's own shards, and each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from shardckpt.format.placement import MAX_BOXES, Box, is_replicated, local_shape, parse_placement, shard_boxes

MESHES = st.lists(st.integers(1, 8), min_size=1, max_size=3).filter(lambda sizes: math.prod(sizes) <= 8)


class MeshShape:
    """All that torch's pure functions ask of a mesh."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)

    def size(self, mesh_dim: int) -> int:
        return self._shape[mesh_dim]


def as_torch(placement: str) -> Any:
    parsed = parse_placement(placement)
    if parsed is None:
        return Replicate()
    return _StridedShard(parsed[0], split_factor=parsed[1]) if placement.startswith("SS") else Shard(parsed[0])


def cut(tensor: torch.Tensor, placement: Any, size: int, index: int) -> torch.Tensor:
    """The share that torch itself cuts."""
    shares, _ = placement._split_tensor(tensor, size, with_padding=False, contiguous=False)
    share: torch.Tensor = shares[index]
    return share


def left_to_right(
    whole: torch.Tensor, mesh: Sequence[int], placements: Sequence[str], at: Sequence[int]
) -> torch.Tensor:
    for size, placement, index in zip(mesh, map(as_torch, placements), at, strict=True):
        if not isinstance(placement, Replicate):
            whole = cut(whole, placement, size, index)
    return whole


def by_torch(whole: torch.Tensor, mesh: Sequence[int], placements: Sequence[str], at: Sequence[int]) -> torch.Tensor:
    """What the rank holds: split in the order that torch finds for a dimension, where it finds none from the left."""
    for dim in range(whole.ndim):
        own = [text if (parse_placement(text) or (None,))[0] == dim else "R" for text in placements]
        size_of: Any = MeshShape(mesh)
        order = DTensorSpec._maybe_convert_StridedShard_to_shard_order(tuple(map(as_torch, own)), size_of)
        if order is None:
            whole = left_to_right(whole, mesh, own, at)
        for entry in order or ():
            for mesh_dim in entry.mesh_dims:
                whole = cut(whole, Shard(dim), mesh[mesh_dim], at[mesh_dim])
    return whole


def by_boxes(whole: torch.Tensor, boxes: Sequence[Box]) -> torch.Tensor:
    """The shard put together from the boxes. -1 where no box puts anything."""
    shard = torch.full(local_shape(boxes, whole.ndim), -1, dtype=whole.dtype)
    for box in boxes:
        source = tuple(slice(at, at + n) for at, n in zip(box.offsets, box.lengths, strict=True))
        target = tuple(slice(at, at + n) for at, n in zip(box.local, box.lengths, strict=True))
        assert bool((shard[target] == -1).all()), "two boxes overlap in the shard"
        shard[target] = whole[source]
    return shard


def arange(shape: Sequence[int]) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(tuple(shape))


def coordinates(mesh: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, mesh))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[int], list[str]]:
    """(tensor shape, mesh shape, placements): any mixture."""
    shape = draw(st.lists(st.integers(0, 13), min_size=1, max_size=3))
    mesh = draw(MESHES)
    dims = st.integers(0, len(shape) - 1)
    strided = st.builds(lambda dim, factor: f"SS({dim},{factor})", dims, st.sampled_from([1, 2, 2, 3, 4, 8]))
    placement = st.just("R") | dims.map(lambda dim: f"S({dim})") | strided | strided
    return shape, mesh, draw(st.lists(placement, min_size=len(mesh), max_size=len(mesh)))


@given(cases())
@settings(max_examples=250, deadline=None)
@example(([9], [4, 2], ["SS(0,2)", "S(0)"]))
@example(([5, 3], [2, 2], ["SS(0,2)", "S(0)"]))
@example(([9], [4, 2], ["SS(0,3)", "S(0)"]))
@example(([7], [2, 2, 2], ["SS(0,4)", "SS(0,2)", "S(0)"]))
@example(([7], [2, 2, 2], ["SS(0,2)", "SS(0,2)", "S(0)"]))
@example(([0, 1], [8], ["S(0)"]))
def test_our_boxes_are_torchs_shards(case: tuple[list[int], list[int], list[str]]) -> None:
    shape, mesh, placements = case
    whole = arange(shape)
    for at in coordinates(mesh):
        expected, boxes = by_torch(whole, mesh, placements, at), shard_boxes(shape, mesh, placements, at)
        if expected.numel() == 0:
            assert boxes == ()
        else:
            assert torch.equal(by_boxes(whole, boxes), expected)
        assert all(all(box.lengths) for box in boxes), "an empty box is no box"


@given(cases(), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_both_readings_agree_where_everything_divides(case: tuple[list[int], list[int], list[str]], times: int) -> None:
    shape, mesh, placements = case
    factors = [1] * len(shape)
    for size, parsed in zip(mesh, map(parse_placement, placements), strict=True):
        if parsed is not None:
            factors[parsed[0]] *= size * parsed[1]
    assume(math.prod(factors) < 20_000)
    whole = arange([factor * times for factor in factors])
    for at in coordinates(mesh):
        boxes = shard_boxes(whole.shape, mesh, placements, at)
        assert torch.equal(by_boxes(whole, boxes), left_to_right(whole, mesh, placements, at))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_the_shards_make_up_the_whole_once_for_each_replica(case: tuple[list[int], list[int], list[str]]) -> None:
    shape, mesh, placements = case
    replicas = math.prod(size for size, placement in zip(mesh, placements, strict=True) if placement == "R")
    times = torch.zeros(shape, dtype=torch.int64)
    for at in coordinates(mesh):
        for box in shard_boxes(shape, mesh, placements, at):
            times[tuple(slice(low, low + n) for low, n in zip(box.offsets, box.lengths, strict=True))] += 1
    assert bool((times == replicas).all())
    assert is_replicated(placements) == (placements == ["R"] * len(mesh))


@given(cases().filter(lambda case: not any(placement.startswith("SS") for placement in case[2])))
@settings(max_examples=100, deadline=None)
def test_shape_and_offset_are_those_that_torch_computes(case: tuple[list[int], list[int], list[str]]) -> None:
    shape, mesh, placements = case
    for at in coordinates(mesh):
        lengths, offsets = _compute_local_shape_and_global_offset(
            shape, mesh, list(at), list(map(as_torch, placements))
        )
        boxes = shard_boxes(shape, mesh, placements, at)
        assert [(box.offsets, box.lengths) for box in boxes] == ([(offsets, lengths)] if math.prod(lengths) else [])


def fsdp_and_tp_shards(mesh: tuple[int, int], rows: int, columns: int, *, style: str) -> Iterator[tuple[Any, Any, Any]]:
    """(coordinate, placements, local shard) of every rank, as FSDP2 over tensor parallelism makes them, peerless."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for rank in range(math.prod(mesh)):
        dist.init_process_group("fake", rank=rank, world_size=math.prod(mesh), store=FakeStore())
        try:
            device_mesh = dist.device_mesh.init_device_mesh("cpu", mesh, mesh_dim_names=("dp", "tp"))
            linear = torch.nn.Linear(columns, rows, bias=False)
            with torch.no_grad():
                linear.weight.copy_(arange((rows, columns)))
            split = ColwiseParallel() if style == "column" else RowwiseParallel()
            parallelize_module(linear, device_mesh["tp"], split, src_data_rank=None)
            fully_shard(linear, mesh=device_mesh["dp"])
            weight: Any = linear.weight
            yield divmod(rank, mesh[1]), weight.placements, weight.to_local().detach().clone()
        finally:
            dist.destroy_process_group()


def spell(placement: Any) -> str:
    if isinstance(placement, _StridedShard):
        return f"SS({placement.dim},{placement.split_factor})"
    return "R" if isinstance(placement, Replicate) else f"S({placement.dim})"


@pytest.mark.parametrize(
    ("mesh", "rows", "style"),
    [
        ((2, 2), 8, "column"),
        ((2, 2), 5, "column"),
        ((2, 2), 3, "column"),
        ((4, 2), 9, "column"),
        ((2, 4), 11, "column"),
        ((2, 2), 1, "column"),
        ((2, 2), 5, "row"),
        ((4, 2), 2, "row"),
    ],
)
def test_what_fsdp2_over_tensor_parallelism_really_holds(mesh: tuple[int, int], rows: int, style: str) -> None:
    """The case for which `_StridedShard` exists. It need not divide: a vocabulary of 50,257 does not."""
    whole = arange((rows, 6)).float()
    strided = 0
    for at, placements, local in fsdp_and_tp_shards(mesh, rows, 6, style=style):
        texts = [spell(placement) for placement in placements]
        strided += any(text.startswith("SS") for text in texts)
        boxes = shard_boxes((rows, 6), mesh, texts, at)
        assert torch.equal(by_boxes(whole, boxes), local) if boxes else local.numel() == 0
    assert strided == (math.prod(mesh) if style == "column" else 0)


def test_tensors_without_dimensions_and_without_elements() -> None:
    assert shard_boxes((), (2,), ("R",), (1,)) == (Box((), (), ()),)
    assert local_shape([Box((), (), ())], 0) == ()
    assert shard_boxes((0, 3), (2,), ("S(1)",), (0,)) == ()
    assert shard_boxes((4, 0), (2,), ("R",), (0,)) == ()
    assert local_shape([], 2) == (0, 0)


@pytest.mark.parametrize(
    ("shape", "mesh", "placements", "at"),
    [
        ((4,), (2,), ("S(1)",), (0,)),
        ((), (2,), ("S(0)",), (0,)),
        ((4,), (2,), ("S(0)",), (2,)),
        ((4,), (2,), ("S(0)",), (-1,)),
        ((4,), (2, 2), ("S(0)",), (0, 0)),
        ((4,), (2,), ("S(0)", "R"), (0,)),
        ((4,), (2,), ("S(0)",), (0, 0)),
        ((4,), (2,), ("P",), (0,)),
        ((4,), (2,), ("S(-1)",), (0,)),
        ((4,), (2,), ("S(0) ",), (0,)),
        ((4,), (2,), ("SS(0)",), (0,)),
        ((4,), (2,), ("SS(0,0)",), (0,)),
        ((4,), (2,), ("SS(0,100000)",), (0,)),
        ((4,), (2,), ("",), (0,)),
        ((4,), (2,), ("S(\u0661)",), (0,)),
    ],
)
def test_what_does_not_fit_is_refused(shape: Any, mesh: Any, placements: Any, at: Any) -> None:
    with pytest.raises(ValueError, match=r"placement|dimensions|coordinate|argument"):
        shard_boxes(shape, mesh, placements, at)


def test_shards_of_absurdly_many_pieces_are_refused_at_once() -> None:
    assert len(shard_boxes((1 << 40,), (2,), ("SS(0,4096)",), (0,))) == 4096
    with pytest.raises(ValueError, match="pieces"):
        shard_boxes((1 << 40,), (2,), (f"SS(0,{MAX_BOXES + 1})",), (0,))
    with pytest.raises(ValueError, match="pieces"):
        shard_boxes((1 << 40, 1 << 40), (2, 2), ("SS(0,1024)", "SS(1,1024)"), (0, 0))
    assert len(shard_boxes((1 << 61,), (2, 2, 2), ("SS(0,9999)",) * 3, (0, 1, 0))) <= 30_000
