"""From what the user says of a plain tensor to boxes of a whole one: this rank's, and those of all who write it. Pure.

Every rank works out alone what all tensor-parallel ranks of its stage hold, and who of their data-parallel ranks writes
it; that they came to the same is checked when the record is made (`check_agreed`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.sharding import describe
from shardckpt.errors import InvalidStateError
from shardckpt.format.manifest import LayoutEntry, Table, TensorEntry
from shardckpt.format.placement import Box, Piece
from shardckpt.split import Rule, Split, cuts_of

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """A whole tensor, and what of it the tensor-parallel ranks of a stage hold."""

    shape: tuple[int, ...]
    held: tuple[tuple[Box, ...], ...]
    """By tensor-parallel rank; no empty ones."""
    tp_rank: int
    """Of this rank."""

    @property
    def boxes(self) -> tuple[Box, ...]:
        """What this rank holds."""
        return self.held[self.tp_rank]

    def pieces(self, writers: Iterable[int]) -> tuple[Piece, ...]:
        """Who writes what, if these global ranks do: one for each tensor-parallel rank."""
        rows = zip(writers, self.held, strict=True)
        return tuple(Piece(rank, box.offsets, box.lengths) for rank, boxes in rows for box in boxes)


def joined(name: str, tensor: torch.Tensor, split: Split, at: Coordinates) -> Joined:
    """What a tensor of this rank is a part of. `InvalidStateError` if it is not what the split says."""
    local, stage = tuple(tensor.shape), at.stage or (at.dp_ranks,)
    tp_rank = next(number for number, ranks in enumerate(stage) if at.rank in ranks)
    cuts = cuts_of(name, local, split, ranks=len(stage), rank=tp_rank)
    dim = split.dim % len(local)
    shape = (*local[:dim], sum(length for own in cuts for _, length in own), *local[dim + 1 :])
    return Joined(shape, tuple(tuple(_boxes(local, dim, own)) for own in cuts), tp_rank)


def _boxes(local: tuple[int, ...], dim: int, cuts: list[tuple[int, int]]) -> Iterable[Box]:
    begins = itertools.accumulate((length for _, length in cuts), initial=0)
    for (start, length), begin in zip(cuts, begins, strict=False):
        lengths = (*local[:dim], length, *local[dim + 1 :])
        if math.prod(lengths):
            zeros = [0] * len(local)
            offsets, inside = zeros.copy(), zeros.copy()
            offsets[dim], inside[dim] = start, begin
            yield Box(tuple(offsets), lengths, tuple(inside))


def extent_of(name: str, tensor: torch.Tensor, rule: Rule | None, at: Coordinates) -> tuple[Shape, tuple[Box, ...]]:
    """The shape of the whole that a tensor of the state stands for, and what of it this rank has."""
    if isinstance(rule, Split):
        whole = joined(name, tensor, rule, at)
        return whole.shape, whole.boxes
    shape, sharding = tuple(tensor.shape), describe(name, tensor)
    if sharding is not None:
        return shape, sharding.boxes(shape)
    zeros = (0,) * len(shape)
    return shape, (Box(zeros, shape, zeros),) if all(shape) else ()


def check_agreed(tables: Sequence[Table], layouts: Sequence[LayoutEntry]) -> None:
    """`InvalidStateError` for a tensor in pieces that not all who hold it describe alike, or not all write.

    On rank 0, for all tables of a save, whose numbers mean these layouts.
    """
    if not any(layout.pieces for layout in layouts):
        return
    seen: dict[str, TensorEntry] = {}
    holders: dict[str, set[int]] = {}
    for table in tables:
        for name, entry in table.tensors.items():
            if not layouts[entry.layout].pieces:
                continue
            holders.setdefault(name, set()).update(table.ranks)
            if seen.setdefault(name, entry) != entry:
                told = f"{entry.dtype}, {list(entry.shape)}, not {seen[name].dtype}, {list(seen[name].shape)}"
                raise InvalidStateError(
                    f"{name}: ranks do not agree on how its parts join: rank {table.ranks[0]} says {told}, or cuts it "
                    "in another way; give all of them the same rules of TensorSplit"
                )
    for name, entry in seen.items():
        missing = {piece.rank for piece in layouts[entry.layout].pieces} - holders[name]
        if missing:
            raise InvalidStateError(f"{name}: rank {min(missing)} should write a part of it, and does not hold it")
