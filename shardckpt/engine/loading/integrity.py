"""Checksums of bytes that no single rank reads whole.

A record's CRC covers all its bytes, but a rank of another mesh reads only some of them. CRC-32 is linear over
GF(2): with L(m) = crc(m) xor crc(zeros of the same length), L of a record is the xor of the L of its disjoint pieces,
each put at its place among zeros. So each rank sums up what it read, and the sums are joined on rank 0: every byte
that the job read is checked, and no rank reads a byte for the sake of checking.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.checksum import crc32, crc32_combine
from shardckpt.format.index import ITEMSIZE, StoredRecord
from shardckpt.format.placement import Piece, is_tiling


class Region(NamedTuple):
    """A box inside a record (`start`, `lengths`, in elements of it): what one rank read of it."""

    start: tuple[int, ...]
    lengths: tuple[int, ...]


class Runs(NamedTuple):
    """A region as runs of bytes of the record: `count` of them are equally long; offsets ascend."""

    offsets: tuple[int, ...]
    nbytes: int

    @property
    def total(self) -> int:
        return len(self.offsets) * self.nbytes

    @property
    def span(self) -> int:
        return self.offsets[-1] + self.nbytes - self.offsets[0]


def runs_of(record: StoredRecord, region: Region) -> Runs:
    """The bytes of a region, in the row-major order of its elements."""
    if region.lengths == record.shape:
        return Runs((0,), record.nbytes)
    strides = [math.prod(record.shape[d + 1 :]) for d in range(len(record.shape))]
    inner = len(record.shape)
    while inner and region.lengths[inner - 1] == record.shape[inner - 1]:
        inner -= 1
    # dimensions from `inner` on are whole; the one before it still makes one run with them
    outer = max(inner - 1, 0)
    itemsize = ITEMSIZE[record.dtype]
    run = math.prod(region.lengths[outer:]) * itemsize
    base = sum(start * stride for start, stride in zip(region.start, strides, strict=True))
    offsets = [base]
    for dim in range(outer):
        offsets = [at + i * strides[dim] for at in offsets for i in range(region.lengths[dim])]
    return Runs(tuple(offset * itemsize for offset in offsets), run)


def linear_sum(record_nbytes: int, runs: Runs, pieces: Iterable[memoryview]) -> int:
    """L of the record with zeros where this rank has read nothing; `pieces` are the runs' bytes, in order."""
    summed = zip(runs.offsets, pieces, strict=True)
    return sum_among_zeros(record_nbytes, ((offset, runs.nbytes, crc32(piece)) for offset, piece in summed))


def sum_among_zeros(record_nbytes: int, summed: Iterable[tuple[int, int, int]]) -> int:
    """The same from (offset in the record, nbytes, CRC) of each piece; they are disjoint, and offsets ascend."""
    total, position = 0, 0
    for offset, nbytes, crc in summed:
        total = crc32_combine(total, crc ^ zero_crc(nbytes), offset + nbytes - position)
        position = offset + nbytes
    return crc32_combine(total, 0, record_nbytes - position) if record_nbytes > position else total


@functools.lru_cache(maxsize=4096)
def zero_crc(nbytes: int) -> int:
    """The CRC of that many zero bytes."""
    if nbytes == 0:
        return 0
    if nbytes == 1:
        return int(crc32(b"\0"))
    half = zero_crc(nbytes // 2)
    doubled = crc32_combine(half, half, nbytes // 2)
    return int(crc32_combine(doubled, zero_crc(1), 1)) if nbytes % 2 else int(doubled)


@dataclass(frozen=True, slots=True)
class PartialSum:
    """What a rank sends of a record that it read in part: where it is, what was read, and the sum."""

    file: str
    record: int
    tensor: str
    """The name by which it was read; tied tensors share a record, and may be cut in different ways."""
    shape: tuple[int, ...]
    """Of the whole record."""
    region: Region
    nbytes: int
    record_nbytes: int
    crc: int
    """The CRC that the index gives for the whole record."""
    total: int

    def encode(self) -> list[Any]:
        places = [list(self.shape), list(self.region.start), list(self.region.lengths)]
        return [self.file, self.record, self.tensor, *places, self.nbytes, self.record_nbytes, self.crc, self.total]

    @classmethod
    def decode(cls, content: Any) -> PartialSum:
        file, record, tensor, shape, start, lengths, *numbers = content
        return cls(file, record, tensor, tuple(shape), Region(tuple(start), tuple(lengths)), *numbers)


def join_sums(sums: Iterable[PartialSum]) -> tuple[list[str], int]:
    """(files with a record whose bytes are not what was written, bytes that could not be checked).

    Pieces that several ranks read are taken once; they must agree. A record of which the job together did not read
    every byte exactly once, by one name, cannot be checked: its bytes are counted.
    """
    by_record: dict[tuple[str, int, str], dict[Region, PartialSum]] = {}
    damaged: set[str] = set()
    for item in sums:
        pieces = by_record.setdefault((item.file, item.record, item.tensor), {})
        known = pieces.setdefault(item.region, item)
        if known.total != item.total:
            damaged.add(item.file)
    unchecked = 0
    for (file, _, _), pieces in by_record.items():
        some = next(iter(pieces.values()))
        if not is_tiling(some.shape, [Piece(0, region.start, region.lengths) for region in pieces]):
            unchecked += sum(piece.nbytes for piece in pieces.values())
            continue
        joined = functools.reduce(lambda total, piece: total ^ piece.total, pieces.values(), 0)
        if joined != some.crc ^ zero_crc(some.record_nbytes):
            damaged.add(file)
    return sorted(damaged), unchecked


def damage_error(files: Sequence[str], *, step: int, url: str, changed: bool) -> CheckpointDamagedError:
    """What is said of files whose bytes are not those that were written; `changed`: whether the state may be, too."""
    half = "by now some tensors of the state are loaded and some are not, so do not go on with it"
    error = CheckpointDamagedError(
        f"step {step} at {url} is damaged: the bytes of {', '.join(files[:10])} are not those that were written; "
        f"{half if changed else 'nothing was loaded'}. Resume from another step, or restore the files from a copy",
        step=step,
    )
    error.state_changed = changed
    return error
