"""Who holds a part of a tensor: by arithmetic the same as by asking every place of the mesh."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.format.placement import Box, shard_boxes
from shardckpt.format.placing.holders import Extent, Holder, holders

MOST = 1 << 19
MESHES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def by_asking_all(shape: Sequence[int], mesh: Sequence[int], placements: Sequence[str], part: Extent) -> list[Holder]:
    found = []
    alone = [range(1) if placement == "R" else range(size) for size, placement in zip(mesh, placements, strict=True)]
    for coordinate in itertools.product(*alone):
        boxes = shard_boxes(shape, mesh, placements, coordinate)
        if any(overlap(box, part) for box in boxes):
            found += [Holder(coordinate, box) for box in boxes]
    return found


def overlap(box: Box, part: Extent) -> bool:
    rows = zip(box.offsets, box.lengths, *part, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in rows)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int], list[str], Extent]:
    mesh = draw(MESHES)
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    dims = st.integers(0, len(shape) - 1)
    kinds = st.one_of(
        st.just("R"),
        dims.map(lambda dim: f"S({dim})"),
        st.tuples(dims, st.integers(1, 8)).map(lambda pair: f"SS({pair[0]},{pair[1]})"),
    )
    placements = [draw(kinds) for _ in mesh]
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    lengths = tuple(draw(st.integers(1, size - at)) for at, size in zip(offsets, shape, strict=True))
    return shape, mesh, placements, (offsets, lengths)


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_it_finds_what_asking_every_place_finds(case: Any) -> None:
    shape, mesh, placements, part = case
    assert holders(shape, mesh, placements, part, most=MOST) == by_asking_all(shape, mesh, placements, part)


def test_a_number_has_one_holder() -> None:
    assert holders((), (4, 2), ("R", "R"), ((), ()), most=1) == [Holder((0, 0), Box((), (), ()))]


@pytest.mark.parametrize("part", [((0, 0), (0, 5)), ((2, 3), (4, 0))])
def test_nothing_has_no_holder(part: Extent) -> None:
    assert holders((8, 8), (4,), ("S(0)",), part, most=1) == []


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (3, 8)])
@pytest.mark.parametrize("placement", ["S(0)", "S(1)", "SS(0,3)"])
def test_what_is_not_in_the_tensor_has_no_holder(shape: tuple[int, int], placement: str) -> None:
    """Of an empty tensor, too: DCP asks for what begins at an offset."""
    assert holders(shape, (4,), (placement,), ((3, 0), (1, 1)), most=100) == []


@pytest.mark.parametrize("placements", [("S(0)", "S(1)"), ("SS(0,64)", "S(0)"), ("SS(0,3)", "S(1)")])
def test_more_than_can_be_is_refused(placements: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="more than 100 pieces"):
        holders((4096, 4096), (64, 64), placements, ((0, 0), (4096, 4096)), most=100)


def test_a_dimension_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="of a tensor of 1 dimensions"):
        holders((8,), (2,), ("S(1)",), ((0,), (8,)), most=1)


def lines_run(mesh: tuple[int, int], placements: tuple[str, str]) -> int:
    """Lines of ours that it takes to find one row."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line" and "shardckpt" in frame.f_code.co_filename
        return trace

    rows = math.prod(mesh) * 4
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = holders((rows, 64), mesh, placements, ((rows // 3, 0), (1, 8)), most=1)
    finally:
        sys.settrace(before)
    assert len(found) == 1
    return count


@pytest.mark.parametrize("placements", [("S(0)", "R"), ("SS(0,8)", "S(0)"), ("S(0)", "S(0)"), ("S(0)", "S(1)")])
def test_the_work_does_not_grow_with_the_mesh(placements: tuple[str, str]) -> None:
    few, many = (lines_run((dp, 8), placements) for dp in (2, 1 << 14))
    assert many == few
