"""Stretches, intersections and places of blocks, against what torch does with the elements' numbers."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.engine.consolidated.blocks import Block, common, is_one_run, position, stretch, whole

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def stretches(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@st.composite
def blocks(draw: st.DrawFn, shape: tuple[int, ...]) -> Block:
    offsets = [draw(st.integers(0, max(0, n - 1))) for n in shape]
    return Block(tuple(offsets), tuple(draw(st.integers(0, n - at)) for at, n in zip(offsets, shape, strict=True)))


@given(stretches())
@settings(max_examples=500)
def test_a_stretch_is_the_same_elements_in_the_same_order(case):
    shape, start, stop = case
    numbers = torch.arange(math.prod(shape)).view(shape)
    found = list(stretch(shape, start, stop))
    cut = [numbers[block.slices] for block in found]
    assert [int(n) for part in cut for n in part.flatten()] == list(range(start, stop))
    assert all(block.numel == part.numel() > 0 for block, part in zip(found, cut, strict=True))
    assert all(is_one_run(shape, block.lengths) for block in found)
    assert [position(shape, block.offsets) for block in found] == [int(part.flatten()[0]) for part in cut]
    assert len(found) <= max(1, 2 * len(shape) - 1)


@given(st.data())
@settings(max_examples=500)
def test_what_two_blocks_share(data):
    shape = data.draw(shapes)
    one, other = data.draw(blocks(shape)), data.draw(blocks(shape))
    numbers = torch.arange(math.prod(shape)).view(shape)
    expected = {int(n) for n in numbers[one.slices].flatten()} & {int(n) for n in numbers[other.slices].flatten()}
    shared = common(one, other)
    if shared is None:
        assert not expected
        return
    assert {int(n) for n in numbers[shared.slices].flatten()} == expected
    for outer in (one, other):
        assert torch.equal(numbers[outer.slices][shared.inside(outer).slices], numbers[shared.slices])


@given(st.data())
@settings(max_examples=500)
def test_one_run_is_what_torch_calls_contiguous(data):
    shape = data.draw(st.lists(st.integers(1, 4), max_size=4).map(tuple))
    block = data.draw(blocks(shape))
    part = torch.empty(shape)[block.slices]
    if part.numel():
        assert is_one_run(shape, block.lengths) == part.is_contiguous()


def test_the_whole():
    assert whole((3, 4)) == Block((0, 0), (3, 4))
    assert common(whole(()), whole(())) == Block((), ())
    assert whole((2, 3)).moved((5, 1)) == Block((5, 1), (2, 3))
