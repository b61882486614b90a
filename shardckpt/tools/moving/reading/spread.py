"""Where the bytes of a whole tensor lie in the files of a step, and which of them fill a window. Pure; no torch.

A tensor is taken as one of bytes, with the bytes of an element as its last dimension: so windows may begin anywhere.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardckpt.engine.consolidated.blocks import Block, Shape, common, is_one_run, position, stretch
from shardckpt.engine.loading.integrity import Region, Runs, runs_of
from shardckpt.format.checksum import combine
from shardckpt.format.index import ITEMSIZE, StoredRecord
from shardckpt.format.placement import Box
from shardckpt.tools.moving.seam import TensorFacts

RecordName = tuple[str, int]
"""A file, and the number of a record in it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor, and where it begins (`local`) in the record that holds it; all in bytes."""

    file: str
    number: int
    record: StoredRecord
    block: Block
    local: Shape

    @property
    def name(self) -> RecordName:
        return self.file, self.number

    @classmethod
    def of(cls, file: str, number: int, record: StoredRecord, box: Box) -> Piece:
        size = ITEMSIZE[record.dtype]
        as_bytes = record._replace(dtype="uint8", shape=(*record.shape, size))
        return cls(file, number, as_bytes, Block((*box.offsets, 0), (*box.lengths, size)), (*box.local, 0))


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of a record (`runs`, of the region `lengths`), and the part of a block of the window that they are."""

    piece: Piece
    runs: Runs
    lengths: Shape
    block: Shape
    """The lengths of the block, which is one run of the window, from its byte `at` on."""
    at: int
    there: Block
    """Where in the block."""

    @property
    def start(self) -> int:
        """In the file."""
        return self.piece.record.at + self.runs.offsets[0]


class Spread:
    """A whole tensor, and the pieces that it is made of."""

    def __init__(self, name: str, facts: TensorFacts, pieces: Sequence[Piece]) -> None:
        self.name = name
        self.facts = facts
        self.pieces = sorted(pieces, key=lambda piece: piece.block.offsets)
        self._shape = (*facts.shape, ITEMSIZE[facts.dtype])
        self._starts = [piece.block.offsets[0] for piece in self.pieces]
        self._longest = max((piece.block.lengths[0] for piece in self.pieces), default=0)

    def needs(self, start: int, stop: int) -> Iterator[Need]:
        """What fills these bytes of the tensor. `ValueError` if its pieces do not."""
        done = 0
        for block in stretch(self._shape, start, stop):
            found = 0
            for piece in self._near(block):
                shared = common(block, piece.block)
                if shared is not None:
                    here, there = shared.inside(piece.block).moved(piece.local), shared.inside(block)
                    runs = runs_of(piece.record, Region(here.offsets, here.lengths))
                    yield Need(piece, runs, here.lengths, block.lengths, done, there)
                    found += shared.numel
            if found != block.numel:
                raise ValueError(f"the files hold {found} of {block.numel} bytes that are needed of {self.name}")
            done += block.numel

    def crc(self) -> int | None:
        """The CRC of the whole tensor, if it is made of whole records that lie in it one after the other."""
        at, sums = 0, []
        for piece in self.pieces:
            numel = piece.block.numel
            is_next = position(self._shape, piece.block.offsets) == at and is_one_run(self._shape, piece.block.lengths)
            if not is_next or any(piece.local) or numel != piece.record.nbytes:
                return None
            at += numel
            sums.append((piece.record.crc, numel))
        return combine(sums)[0] if at == self.facts.nbytes else None

    def checkable(self) -> dict[RecordName, StoredRecord]:
        """The records that this tensor alone fills, so that who reads all of it has read all of them."""
        nbytes: Counter[RecordName] = Counter()
        for piece in self.pieces:
            nbytes[piece.name] += piece.block.numel
        return {piece.name: piece.record for piece in self.pieces if nbytes[piece.name] == piece.record.nbytes}

    def _near(self, block: Block) -> Sequence[Piece]:
        """The pieces that may have some of a block, and not many others."""
        first, end = block.offsets[0], block.offsets[0] + block.lengths[0]
        low = bisect.bisect_left(self._starts, first - self._longest + 1)
        return self.pieces[low : bisect.bisect_left(self._starts, end)]
