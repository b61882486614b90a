"""The model as a whole, as rank 0 knows it: which fragment of which tensor lies where. No bytes are held here.

A rank's file has its fragments one after the other, tensors in natural order of their names. Rank 0 goes through all
names in that order, too, and so knows where in each file it is without an index of any: it never holds the plans of
all ranks, only of the one tensor at which it is.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardckpt.engine.consolidated.blocks import Block, Shape, whole
from shardckpt.engine.consolidated.holding import FlatPiece
from shardckpt.engine.consolidated.inventory import Inventory, natural
from shardckpt.engine.loading.integrity import zero_crc
from shardckpt.errors import InvalidStateError
from shardckpt.format.index import ITEMSIZE


@dataclass(frozen=True, slots=True)
class Kind:
    """The ranks that have the same inventory. The first of them writes the plain tensors, and tells of the rest."""

    inventory: Inventory
    ranks: tuple[int, ...]

    @property
    def teller(self) -> int:
        return self.ranks[0]


EVERYWHERE = -1
"""In the place of a rank: all of them hold it, and it is in no file."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a block of a tensor is: at byte `at` of the file of a rank."""

    rank: int
    at: int
    block: Block


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """A tensor of the consolidated file; `sources` cover every element once, in the order of their offsets."""

    name: str
    dtype: str
    shape: Shape
    crc: int
    sources: tuple[Source, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class _Found:
    """A fragment, met on the way through all files. `holders`: the ranks that together hold the whole tensor."""

    source: Source
    holders: Any
    total: int


class Whole:
    """All ranks' holdings put together. On rank 0."""

    def __init__(
        self, kinds: Sequence[Kind], flat: Sequence[Sequence[FlatPiece]], *, plain_in_files: bool = True
    ) -> None:
        """`flat`: what each rank has in flat parameters, in rank order. `plain_in_files`: whether plain tensors are in
        the file of who tells of them; if not, all ranks must be of one kind."""
        self._plain_in_files = plain_in_files
        self._ranks = len(flat)
        self._kinds = [(kind, frozenset(kind.ranks)) for kind in kinds]
        self._flat: dict[str, list[tuple[int, FlatPiece]]] = {}
        for rank, pieces in enumerate(flat):
            for piece in pieces:
                self._flat.setdefault(piece.name, []).append((rank, piece))
        self._names = {name for kind in kinds for name in kind.inventory.tensors} | self._flat.keys()

    def tensors(self, sums: Sequence[array[int]]) -> Iterator[WholeTensor]:
        """Every tensor, in the order of the files, one after the other; from each rank's sums in the order of its file.

        `InvalidStateError` if what the ranks hold does not make a whole tensor, or several different ones.
        """
        cursor = _Cursor(sums)
        for name, dtype, shape in self.described():
            yield _joined(name, dtype, shape, list(self._find(name, cursor)))
        cursor.check()

    def located(self, crcs: Sequence[int]) -> Iterator[WholeTensor]:
        """The same for who knows the CRCs of the tensors, and no sums, because rank 0 has checked them."""
        cursor = _Cursor([array("I")] * self._ranks, known=False)
        for (name, dtype, shape), crc in zip(self.described(), crcs, strict=True):
            yield replace(_joined(name, dtype, shape, list(self._find(name, cursor))), crc=crc)

    def described(self) -> Iterator[tuple[str, str, Shape]]:
        """Name, dtype and shape of every tensor, in the order of the files."""
        for name in sorted(self._names, key=natural):
            yield name, *self._described(name)

    def _described(self, name: str) -> tuple[str, Shape]:
        entries = [kind.inventory.tensors[name] for kind, _ in self._kinds if name in kind.inventory.tensors]
        said = {(entry.dtype, entry.shape) for entry in entries}
        said |= {(piece.dtype, piece.shape) for _, piece in self._flat.get(name, ())}
        if len(said) > 1:
            texts = " and ".join(f"{dtype}{list(shape)}" for dtype, shape in sorted(said))
            raise InvalidStateError(f"{name} is not the same on all ranks: {texts}; give it one dtype and one shape")
        return next(iter(said))

    def _find(self, name: str, cursor: _Cursor) -> Iterator[_Found]:
        """All fragments of a tensor; moves on in every file that has one."""
        for kind, members in self._kinds:
            inventory = kind.inventory
            entry = inventory.tensors.get(name)
            if entry is None or not math.prod(entry.shape):
                continue
            if inventory.is_plain(name):
                size = ITEMSIZE[entry.dtype] if self._plain_in_files else 0
                found = cursor.take(kind.teller, whole(entry.shape), size, kind.teller)
                everywhere = replace(found, source=replace(found.source, rank=EVERYWHERE))
                yield found if self._plain_in_files else everywhere
                continue
            holders = inventory.spread(name)
            for rank, blocks in inventory.writers(name):
                for block in blocks if rank in members else ():
                    yield cursor.take(rank, block, ITEMSIZE[entry.dtype], holders)
        for rank, piece in self._flat.get(name, ()):
            yield cursor.take(rank, Block(piece.offsets, piece.lengths), ITEMSIZE[piece.dtype], piece.holders)


class _Cursor:
    """How far the files of all ranks have been gone through."""

    def __init__(self, sums: Sequence[array[int]], *, known: bool = True) -> None:
        """`known`: whether there are any sums."""
        self._sums = sums
        self._known = known
        self._number = [0] * len(sums)
        self._at = [0] * len(sums)

    def take(self, rank: int, block: Block, itemsize: int, holders: Any) -> _Found:
        """The next fragment of a rank's file."""
        if self._known and self._number[rank] >= len(self._sums[rank]):
            raise self._astray(rank)
        total, at = self._sums[rank][self._number[rank]] if self._known else 0, self._at[rank]
        self._number[rank] += 1
        self._at[rank] += block.numel * itemsize
        return _Found(Source(rank, at, block), holders, total)

    def check(self) -> None:
        """All files must be at their ends."""
        for rank, (number, sums) in enumerate(zip(self._number, self._sums, strict=True)):
            if number != len(sums):
                raise self._astray(rank)

    def _astray(self, rank: int) -> InvalidStateError:
        return InvalidStateError(
            f"rank {rank} holds other parts of the model than the placements of its tensors say: are all ranks' meshes "
            f"numbered alike, and does its gang number the ranks as they do? ({len(self._sums[rank])} parts)"
        )


def _joined(name: str, dtype: str, shape: Shape, found: Sequence[_Found]) -> WholeTensor:
    """One whole tensor of what was found. Of several the first is taken; they must be the same."""
    wholes: dict[Any, dict[Block, _Found]] = {}
    for item in found:
        known = wholes.setdefault(item.holders, {}).setdefault(item.source.block, item)
        if known.total != item.total:
            raise _different(name, known.source.rank, item.source.rank)
    numel, nbytes = math.prod(shape), math.prod(shape) * ITEMSIZE[dtype]
    covered = {holders: sum(block.numel for block in blocks) for holders, blocks in wholes.items()}
    complete = [list(blocks.values()) for holders, blocks in wholes.items() if covered[holders] == numel]
    if not complete and numel:
        raise InvalidStateError(
            f"{name} cannot be made whole: all ranks together hold {max(covered.values(), default=0)} of its {numel} "
            "elements; call this on every rank that holds a part of the model"
        )
    totals = [functools.reduce(lambda total, item: total ^ item.total, items, 0) for items in complete]
    for items, total in zip(complete, totals, strict=True):
        if total != totals[0]:
            raise _different(name, complete[0][0].source.rank, items[0].source.rank)
    sources = sorted((item.source for item in complete[0]), key=lambda s: s.block.offsets) if complete else ()
    return WholeTensor(name, dtype, shape, (totals[0] if totals else 0) ^ zero_crc(nbytes), tuple(sources))


def _different(name: str, one: int, other: int) -> InvalidStateError:
    return InvalidStateError(
        f"ranks {one} and {other} hold different values of {name}, of which the whole model has but one: bring the "
        "ranks into step, or, if each has a part of it, make it a DTensor that says so"
    )
