"""Blocks of a row-major tensor, in elements: stretches of memory as blocks, and what two of them share. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]


class Block(NamedTuple):
    """A rectangle of a tensor: where it begins and how far it reaches, for each dimension."""

    offsets: Shape
    lengths: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.lengths)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes a tensor with it."""
        return tuple(slice(at, at + n) for at, n in zip(self.offsets, self.lengths, strict=True))

    def moved(self, by: Sequence[int]) -> Block:
        return Block(tuple(a + b for a, b in zip(self.offsets, by, strict=True)), self.lengths)

    def inside(self, outer: Block) -> Block:
        """The same block, counted from the beginning of one that contains it."""
        return self.moved([-at for at in outer.offsets])


def whole(shape: Shape) -> Block:
    return Block((0,) * len(shape), shape)


def stretch(shape: Shape, start: int, stop: int) -> Iterator[Block]:
    """The elements from `start` to `stop`, in row-major order, as blocks, in that order; each is one run of memory.

    At most two for each dimension but the last: a part of a row, whole rows, a part of a row.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield Block((start,) * len(shape), (stop - start,) * len(shape))
        return
    inner, below = math.prod(shape[1:]), shape[1:]
    row, skipped = divmod(start, inner)
    if skipped:
        for block in stretch(below, skipped, min(stop - row * inner, inner)):
            yield Block((row, *block.offsets), (1, *block.lengths))
        row += 1
    rows = max(stop // inner - row, 0)
    if rows:
        yield Block((row,) + (0,) * len(below), (rows, *below))
        row += rows
    for block in stretch(below, 0, stop - row * inner):
        yield Block((row, *block.offsets), (1, *block.lengths))


def common(one: Block, other: Block) -> Block | None:
    """What both cover; None if they share no element."""
    offsets, lengths = [], []
    for a, n, b, m in zip(one.offsets, one.lengths, other.offsets, other.lengths, strict=True):
        start, end = max(a, b), min(a + n, b + m)
        if start >= end:
            return None
        offsets.append(start)
        lengths.append(end - start)
    return Block(tuple(offsets), tuple(lengths))


def position(shape: Shape, offsets: Sequence[int]) -> int:
    """The number of an element in row-major order."""
    number = 0
    for size, at in zip(shape, offsets, strict=True):
        number = number * size + at
    return number


def is_one_run(shape: Shape, lengths: Sequence[int]) -> bool:
    """Whether a block of these lengths lies in one run of the memory of a row-major tensor of this shape."""
    sides = list(zip(shape, lengths, strict=True))
    first = next((d for d, (_, length) in enumerate(sides) if length != 1), len(sides))
    return all(size == length for size, length in sides[first + 1 :])
