"""Where the shard of a rank lies in the whole tensor, from placements and mesh coordinates alone. Pure; no torch.

Rules (those of `torch.distributed.tensor`, mesh dimensions applied from left to right): `S(d)` splits what is
left of dimension d as `torch.chunk` does; `SS(d, f)` (`_StridedShard`) splits it into f x n chunks and gives
rank i the chunks i, i + n, i + 2n, ...; `R` keeps it.

2026-11: DCP's own `create_chunk_list` of a DTensor gives one box and only its first offset, which is wrong
where a `_StridedShard` leaves several separate ranges; here a shard is a list of boxes, almost always of one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

Interval = tuple[int, int]
"""(start, length) along one dimension."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of the whole tensor (`offsets`, `lengths`), and where it begins in the local shard (`local`).

    All in elements, one number for each dimension.
    """

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    local: tuple[int, ...]


_PLACEMENT = re.compile(r"R|S\((\d+)\)|SS\((\d+),(\d+)\)")


def shard_boxes(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[str], coordinate: Sequence[int]
) -> tuple[Box, ...]:
    """The boxes that the rank at `coordinate` of the mesh holds; none if its shard is empty."""
    dims: list[list[Interval]] = [[(0, length)] for length in shape]
    for size, placement, index in zip(mesh_shape, placements, coordinate, strict=True):
        match = _PLACEMENT.fullmatch(placement)
        if match is None:
            raise ValueError(f"{placement!r} is not a placement: R, S(dim) or SS(dim,split_factor)")
        if match[1] is not None:
            dim = int(match[1])
            dims[dim] = _take(dims[dim], size, (index,))
        elif match[2] is not None:
            dim, factor = int(match[2]), int(match[3])
            dims[dim] = _take(dims[dim], factor * size, range(index, factor * size, size))
    return _product(dims)


def local_shape(boxes: Sequence[Box], ndim: int) -> tuple[int, ...]:
    """The shape of the shard that the boxes make up."""
    if not boxes:
        return (0,) * ndim
    return tuple(max(box.local[d] + box.lengths[d] for box in boxes) for d in range(ndim))


def is_replicated(placements: Sequence[str]) -> bool:
    return all(placement == "R" for placement in placements)


def _take(intervals: list[Interval], chunks: int, wanted: Sequence[int] | range) -> list[Interval]:
    """The chunks numbered `wanted` of the concatenated intervals, split as `torch.chunk(chunks)` does."""
    total = sum(length for _, length in intervals)
    size = -(-total // chunks) if total else 0
    taken: list[Interval] = []
    for number in wanted:
        for start, length in _cut(intervals, number * size, min((number + 1) * size, total)):
            if taken and sum(taken[-1]) == start:
                taken[-1] = (taken[-1][0], taken[-1][1] + length)
            else:
                taken.append((start, length))
    return taken


def _cut(intervals: list[Interval], begin: int, end: int) -> list[Interval]:
    """Positions [begin, end) of the concatenated intervals."""
    pieces: list[Interval] = []
    position = 0
    for start, length in intervals:
        low, high = max(begin, position), min(end, position + length)
        if low < high:
            pieces.append((start + low - position, high - low))
        position += length
    return pieces


def _product(dims: list[list[Interval]]) -> tuple[Box, ...]:
    placed: list[list[tuple[int, int, int]]] = []
    for intervals in dims:
        local = itertools.accumulate((length for _, length in intervals), initial=0)
        placed.append([(start, length, at) for (start, length), at in zip(intervals, local, strict=False)])
    boxes = (Box(*zip(*corner, strict=True)) if corner else Box((), (), ()) for corner in itertools.product(*placed))
    return tuple(box for box in boxes if all(box.lengths))
