"""Which part of which saved shard fills which part of a wanted one: every element checked, on meshes of any size."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from shardckpt.engine.loading.fetching.fetch import find_stored, overlaps
from shardckpt.engine.loading.fit import WantedTensor
from shardckpt.engine.loading.integrity import Region
from shardckpt.engine.loading.sources import Chunk
from shardckpt.format.index import StoredBox
from shardckpt.format.placement import Box, local_shape, shard_boxes
from tests.distributed.tensors import Split

Sizes = tuple[int, ...]
meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@st.composite
def journeys(draw: st.DrawFn) -> tuple[Sizes, tuple[Sizes, Split], tuple[Sizes, Split]]:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=3)))
    return shape, draw(places(shape)), draw(places(shape))


@st.composite
def places(draw: st.DrawFn, shape: Sizes) -> tuple[Sizes, Split]:
    sizes = draw(meshes)
    cuts = tuple(draw(st.sampled_from([None, *range(len(shape))])) for _ in sizes)
    return sizes, Split(cuts, from_the_right=draw(st.booleans()))


def text(placement: Placement) -> str:
    if isinstance(placement, Replicate):
        return "R"
    if isinstance(placement, _StridedShard):
        return f"SS({placement.dim},{placement.split_factor})"
    assert isinstance(placement, Shard)
    return f"S({placement.dim})"


def boxes_of(shape: Sizes, sizes: Sizes, split: Split, coordinate: Sizes) -> tuple[Box, ...]:
    return shard_boxes(shape, sizes, [text(placement) for placement in split.placements(sizes)], coordinate)


def coordinates(sizes: Sizes) -> list[Sizes]:
    return list(itertools.product(*map(range, sizes)))


def part(tensor: torch.Tensor, start: Sizes, lengths: Sizes) -> torch.Tensor:
    return tensor[tuple(slice(at, at + n) for at, n in zip(start, lengths, strict=True))]


@settings(max_examples=200, deadline=None)
@given(journeys())
def test_every_element_comes_from_where_it_lies(journey):
    shape, (before, saved), (after, wanted) = journey
    whole = torch.arange(math.prod(shape)).reshape(shape)
    chunks: dict[tuple[Sizes, Sizes], Chunk] = {}
    for coordinate in coordinates(before):
        for box in boxes_of(shape, before, saved, coordinate):
            chunks.setdefault((box.offsets, box.lengths), (repr(coordinate), box))
    shards = {repr(coordinate): saved.local(whole, before, coordinate) for coordinate in coordinates(before)}
    for coordinate in coordinates(after):
        boxes = boxes_of(shape, after, wanted, coordinate)
        filled = torch.full(local_shape(boxes, len(shape)), -1)
        for (file, _), region, target in overlaps(ask(shape, boxes), list(chunks.values())):
            place = part(filled, target, region.lengths)
            assert (place == -1).all()
            place.copy_(part(shards[file], region.start, region.lengths))
        expected = wanted.local(whole, after, coordinate)
        assert torch.equal(filled.flatten(), expected.flatten())
        assert filled.shape == expected.shape or not expected.numel()


@pytest.mark.parametrize("sizes", [(4, 2), (3, 3), (2, 4), (2, 2, 3), (3, 1, 2), (4, 2, 2)], ids=str)
@pytest.mark.parametrize("from_the_right", [True, False], ids=["fsdp after tp", "left to right"])
def test_one_dimension_cut_by_all_of_a_mesh(sizes, from_the_right):
    """Where it does not divide evenly, in what order it was cut decides who has which row, and who has none."""
    split = Split((0,) * len(sizes), from_the_right=from_the_right)
    for rows in range(40):
        whole = torch.arange(rows)
        for coordinate in coordinates(sizes):
            boxes = boxes_of((rows,), sizes, split, coordinate)
            held = [row for box in boxes for row in range(box.offsets[0], box.offsets[0] + box.lengths[0])]
            assert held == split.local(whole, sizes, coordinate).tolist()


def ask(shape: Sizes, boxes: tuple[Box, ...]) -> WantedTensor:
    return WantedTensor("w", "float32", shape, boxes, None, "fail")


def test_a_shard_of_several_boxes():
    """As a reshaped DTensor has it: columns 0, 1 and 4, 5 lie side by side in one record, and are wanted apart."""
    chunks = [
        ("a", Box((0, 0), (2, 2), (0, 0))),
        ("a", Box((0, 4), (2, 2), (0, 2))),
        ("b", Box((0, 2), (2, 2), (0, 0))),
    ]
    whole = Box((0, 0), (2, 6), (0, 0))
    found = {(file, region, target) for (file, _), region, target in overlaps(ask((2, 6), (whole,)), chunks)}
    assert found == {
        ("a", Region((0, 0), (2, 2)), (0, 0)),
        ("b", Region((0, 0), (2, 2)), (0, 2)),
        ("a", Region((0, 2), (2, 2)), (0, 4)),
    }
    middle = Box((1, 3), (1, 2), (0, 5))
    found = {(file, region, target) for (file, _), region, target in overlaps(ask((2, 6), (middle,)), chunks)}
    assert found == {("b", Region((1, 1), (1, 1)), (0, 5)), ("a", Region((1, 2), (1, 1)), (0, 6))}


@pytest.mark.parametrize("chunks", [[], [("a", Box((0,), (3,), (0,)))], [("a", Box((1,), (3,), (0,)))]], ids=repr)
def test_elements_that_no_file_holds(chunks):
    with pytest.raises(ValueError, match=r"w: the record's files hold [03] of the 4 elements"):
        overlaps(ask((4,), (Box((0,), (4,), (0,)),)), chunks)


def test_nothing_is_wanted_of_an_empty_shard():
    assert overlaps(ask((4,), ()), [("a", Box((0,), (4,), (0,)))]) == []
    assert overlaps(ask((0, 3), ()), []) == []


def test_a_scalar():
    box = Box((), (), ())
    assert overlaps(ask((), (box,)), [("a", box)]) == [(("a", box), Region((), ()), ())]


def test_a_file_that_does_not_hold_what_the_record_says():
    stored = StoredBox("w", 0, (4,), Box((2,), (2,), (0,)))
    assert find_stored({"w": [stored]}, "w", Box((2,), (2,), (7,)), "rank_0.pt") is stored
    for name, box in (("w", Box((0,), (2,), (0,))), ("v", stored.box)):
        with pytest.raises(ValueError, match=rf"rank_0\.pt does not hold the part of {name}"):
            find_stored({"w": [stored]}, name, box, "rank_0.pt")
