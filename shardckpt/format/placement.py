"""Where the shard of a rank lies in the whole tensor, from placements and mesh coordinates alone. Pure; no torch.

The rules are those of `torch.distributed.tensor`, where dimension d of a tensor may be split by several dimensions
of the mesh. `R` keeps it. `S(d)` splits what is left of it as `torch.chunk` does. `SS(d,f)` (`_StridedShard`) stands
for a split that is done after those of mesh dimensions further right, which make f pieces. So there are two readings:

* The splits that the factors tell of are done in that order. This is what FSDP2 after tensor parallelism holds, and
  how torch redistributes (`DTensorSpec._maybe_convert_StridedShard_to_shard_order`).
* Where no order of the mesh dimensions has these factors (a reshaped DTensor), each placement is applied from left
  to right: `SS(d,f)` cuts into f pieces, each piece into as many as the mesh dimension has ranks, and gives rank i
  the i-th of every piece (`_StridedShard._split_tensor`).

Both agree wherever everything divides evenly. 2026-11, torch 2.13: where it does not, they may differ. With 9 rows on
a mesh (4, 2) rank (3, 0) of FSDP2 x TP holds nothing, which the second reading, `DTensor.from_local` and DCP
take for row 8; hence the first wherever it exists. DCP's `create_chunk_list` of a DTensor gives one box and only its
first offset, which is wrong where several separate ranges are left; here a shard is a list of boxes, almost always one.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Interval = tuple[int, int]
"""(start, length) along one dimension."""

MAX_BOXES = 1 << 16
"""Of one shard. Real shards have a few; a record that claims more is not worth the memory."""


class Box(NamedTuple):
    """A rectangle of the whole tensor (`offsets`, `lengths`), and where it begins in the local shard (`local`).

    All in elements, one number for each dimension.
    """

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    local: tuple[int, ...]


class Piece(NamedTuple):
    """A rectangle of the whole tensor (`offsets`, `lengths`, in elements) that `rank` wrote as a record of its own.

    The exception, for tensors of which it is not known how they lie on a mesh (those that come from a DCP planner).
    """

    rank: int
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


class Cut(NamedTuple):
    """One split of a tensor dimension, into `size` shares; `factor` is that of `SS`, 1 for `S`."""

    size: int
    factor: int


_PLACEMENT = re.compile(r"R|S\(([0-9]{1,3})\)|SS\(([0-9]{1,3}),([1-9][0-9]{0,4})\)")


def parse_placement(placement: str) -> tuple[int, int] | None:
    """(tensor dimension, split factor), None for "R"; `ValueError` for a text that is no placement."""
    match = _PLACEMENT.fullmatch(placement)
    if match is None:
        raise ValueError(f"{placement!r} is not a placement: R, S(dim) or SS(dim,split_factor)")
    if match[1] is not None:
        return int(match[1]), 1
    return (int(match[2]), int(match[3])) if match[2] is not None else None


def shard_boxes(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[str], coordinate: Sequence[int]
) -> tuple[Box, ...]:
    """The boxes that the rank at `coordinate` of the mesh holds; none if its shard is empty.

    `ValueError` for placements that do not fit the shape or the mesh.
    """
    cuts: dict[int, list[Cut]] = {}
    indices: dict[int, list[int]] = {}
    for size, placement, index in zip(mesh_shape, placements, coordinate, strict=True):
        if not 0 <= index < size:
            raise ValueError(f"coordinate {list(coordinate)} is not on a mesh of shape {list(mesh_shape)}")
        parsed = parse_placement(placement)
        if parsed is not None:
            if parsed[0] >= len(shape):
                raise ValueError(f"{placement} of a tensor of {len(shape)} dimensions")
            cuts.setdefault(parsed[0], []).append(Cut(size, parsed[1]))
            indices.setdefault(parsed[0], []).append(index)
    dims: list[list[Interval]] = [[(0, length)] for length in shape]
    for dim, of_dim in cuts.items():
        dims[dim] = share_of(shape[dim], of_dim, indices[dim])
    return _product(dims)


def local_shape(boxes: Sequence[Box], ndim: int) -> tuple[int, ...]:
    """The shape of the shard that the boxes make up."""
    if not boxes:
        return (0,) * ndim
    return tuple(max(box.local[d] + box.lengths[d] for box in boxes) for d in range(ndim))


def is_replicated(placements: Sequence[str]) -> bool:
    return all(placement == "R" for placement in placements)


def is_tiling(shape: Sequence[int], pieces: Sequence[Piece]) -> bool:
    """Whether the pieces cover every element of a tensor of this shape exactly once.

    Proof: let c(x) be how many pieces cover x. A piece's corners, added up modulo 2, are what is left of its indicator
    when differences are taken along every dimension; that is injective, so if all corners together leave those of the
    whole tensor, c is odd inside of it. With the right sum of volumes, c is 1 everywhere. Dimensions that no piece cuts
    do not matter. 2^d corners of each piece, d being the dimensions that are cut: more than four are refused.
    """
    if not all(_is_inside(piece, shape) for piece in pieces):
        return False
    cut = [d for d, size in enumerate(shape) if any(piece.lengths[d] != size for piece in pieces)]
    if len(cut) > 4 or sum(math.prod(piece.lengths) for piece in pieces) != math.prod(shape):
        return False
    odd: set[tuple[int, ...]] = set()
    for piece in pieces:
        odd ^= set(itertools.product(*((piece.offsets[d], piece.offsets[d] + piece.lengths[d]) for d in cut)))
    return odd == set(itertools.product(*((0, shape[d]) for d in cut)))


def _is_inside(piece: Piece, shape: Sequence[int]) -> bool:
    if not len(piece.offsets) == len(piece.lengths) == len(shape):
        return False
    sides = zip(piece.offsets, piece.lengths, shape, strict=True)
    return all(at >= 0 and length > 0 and at + length <= size for at, length, size in sides)


def share_of(length: int, cuts: Sequence[Cut], indices: Sequence[int]) -> list[Interval]:
    """What is left of a dimension after all splits of it, given from left to right, for who has these shares."""
    order = nested_order(cuts)
    if order is not None:
        start = 0
        for number in order:
            begin, length = _chunk(length, cuts[number].size, indices[number])
            start += begin
        return [(start, length)]
    intervals = [(0, length)]
    for cut, index in zip(cuts, indices, strict=True):
        total = sum(length for _, length in intervals)
        intervals = _select(intervals, _strided(total, cut, index))
    return intervals


def nested_order(cuts: Sequence[Cut]) -> list[int] | None:
    """In which order the splits were done (their numbers), if each factor counts the pieces made before by those to
    the right of it.

    None if there is no such order. Source: `DTensorSpec._maybe_convert_StridedShard_to_shard_order`, torch 2.13.
    """
    order: list[int] = []
    for number in range(len(cuts) - 1, -1, -1):
        pieces = itertools.accumulate((cuts[done].size for done in order), lambda a, b: a * b, initial=1)
        place = next((i for i, count in enumerate(pieces) if count == cuts[number].factor), None)
        if place is None:
            return None
        order.insert(place, number)
    return order


def _chunk(length: int, chunks: int, index: int) -> Interval:
    """The chunk of that number as `torch.chunk` cuts; what is left for the last ones may be short or nothing."""
    size = -(-length // chunks)
    begin = min(index * size, length)
    return begin, min(size, length - begin)


def _strided(length: int, split: Cut, index: int) -> Iterable[Interval]:
    """The share of every one of `factor` pieces, from the first to the last."""
    full = _chunk(length, split.factor, 0)[1]
    pieces = -(-length // full) if full else 0
    # All but the last are alike: with no share of the first, a rank has at most one of the last.
    first = 0 if _chunk(full, split.size, index)[1] else pieces - 1
    for number in range(max(first, 0), pieces):
        begin, piece = _chunk(length, split.factor, number)
        inner, share = _chunk(piece, split.size, index)
        if share:
            yield begin + inner, share


def _select(intervals: list[Interval], wanted: Iterable[Interval]) -> list[Interval]:
    """The wanted positions (ascending, disjoint) of the concatenated intervals. One pass over both."""
    taken: list[Interval] = []
    number, position = 0, 0  # the interval looked at, and the position at which it begins
    for begin, length in wanted:
        end = begin + length
        while begin < end:
            start, size = intervals[number]
            if begin >= position + size:
                number, position = number + 1, position + size
                continue
            stop = min(end, position + size)
            _append(taken, start + begin - position, stop - begin)
            begin = stop
    return taken


def _append(intervals: list[Interval], start: int, length: int) -> None:
    if intervals and sum(intervals[-1]) == start:
        intervals[-1] = (intervals[-1][0], intervals[-1][1] + length)
    else:
        intervals.append((start, length))
    if len(intervals) > MAX_BOXES:
        raise ValueError(f"a shard in more than {MAX_BOXES} pieces")


def _product(dims: list[list[Interval]]) -> tuple[Box, ...]:
    placed: list[list[tuple[int, int, int]]] = []
    count = 1
    for intervals in dims:
        local = itertools.accumulate((length for _, length in intervals), initial=0)
        placed.append([(start, length, at) for (start, length), at in zip(intervals, local, strict=False) if length])
        count *= len(placed[-1])
    if count > MAX_BOXES:
        raise ValueError(f"a shard in {count} pieces")
    return tuple(
        Box(*zip(*corner, strict=True)) if corner else Box((), (), ()) for corner in itertools.product(*placed)
    )
