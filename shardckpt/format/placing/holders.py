"""Which places of a mesh hold what of a part of a tensor, in time that grows with what is found, not with the mesh.

Pure; no torch. Along one dimension of the tensor the splits are nested, so whoever holds an element is found by one
division for each of them. Where the splits of a dimension are no such order (see `placement`), all of their shares
are looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from shardckpt.format.placement import Box, Cut, nested_order, parse_placement, share_of

Extent: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, lengths) of a rectangle of a tensor, in elements."""


class Holder(NamedTuple):
    """A place of a mesh, by its coordinate, and a box that is held there. Along dimensions of the mesh that split
    nothing the coordinate is 0: all places along them hold the same."""

    coordinate: tuple[int, ...]
    box: Box


class _Share(NamedTuple):
    """What the places with these indices have of one dimension of the tensor."""

    indices: tuple[int, ...]
    intervals: tuple[tuple[int, int, int], ...]
    """(start, length, where it begins in the shard)"""


def holders(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[str], part: Extent, *, most: int
) -> list[Holder]:
    """The boxes that make up the shards which overlap a part of a tensor, in the order of their coordinates.

    `ValueError` if there are more than `most`, or for placements that do not fit the shape or the mesh.
    """
    splits: list[list[int]] = [[] for _ in shape]
    cuts: list[list[Cut]] = [[] for _ in shape]
    for number, (size, placement) in enumerate(zip(mesh_shape, placements, strict=True)):
        parsed = parse_placement(placement)
        if parsed is not None:
            if parsed[0] >= len(shape):
                raise ValueError(f"{placement} of a tensor of {len(shape)} dimensions")
            splits[parsed[0]].append(number)
            cuts[parsed[0]].append(Cut(size, parsed[1]))
    shares = []
    count = 1
    for length, own, start, size in zip(shape, cuts, *part, strict=True):
        shares.append(list(itertools.islice(_along(length, tuple(own), start, start + size, most=most), most + 1)))
        count *= sum(len(share.intervals) for share in shares[-1])
    if count > most:
        raise ValueError(f"a part of a tensor lies in more than {most} pieces")
    found = []
    for combined in itertools.product(*shares):
        coordinate = [0] * len(mesh_shape)
        for dims, share in zip(splits, combined, strict=True):
            for dim, index in zip(dims, share.indices, strict=True):
                coordinate[dim] = index
        for corner in itertools.product(*(share.intervals for share in combined)):
            box = Box(*zip(*corner, strict=True)) if corner else Box((), (), ())
            found.append(Holder(tuple(coordinate), box))
    return sorted(found, key=lambda holder: holder.coordinate) if len(found) > 1 else found


def _along(length: int, cuts: tuple[Cut, ...], low: int, high: int, *, most: int) -> Iterator[_Share]:
    """The shares of one dimension that overlap [low, high)."""
    if low >= min(high, length):
        return
    order = nested_order(cuts)
    if order is None:
        for share in _all_shares(length, cuts, most):
            if any(start < high and start + size > low for start, size, _ in share.intervals):
                yield share
        return
    indices = [0] * len(cuts)

    def descend(depth: int, start: int, size: int) -> Iterator[_Share]:
        if depth == len(order):
            yield _Share(tuple(indices), ((start, size, 0),))
            return
        step = -(-size // cuts[order[depth]].size)
        first, last = max(low - start, 0) // step, (min(high, start + size) - 1 - start) // step
        for index in range(first, last + 1):
            indices[order[depth]] = index
            yield from descend(depth + 1, start + index * step, min(step, size - index * step))

    yield from descend(0, 0, length)


@lru_cache(maxsize=8)
def _all_shares(length: int, cuts: tuple[Cut, ...], most: int) -> tuple[_Share, ...]:
    """Every share of a dimension whose splits are no order."""
    found, count = [], 0
    for indices in itertools.product(*(range(cut.size) for cut in cuts)):
        intervals = [interval for interval in share_of(length, cuts, indices) if interval[1]]
        local = itertools.accumulate((size for _, size in intervals), initial=0)
        placed = tuple((start, size, at) for (start, size), at in zip(intervals, local, strict=False))
        found.append(_Share(indices, placed))
        count += len(placed)
        if count > most:
            raise ValueError(f"a tensor lies in more than {most} pieces")
    return tuple(found)
