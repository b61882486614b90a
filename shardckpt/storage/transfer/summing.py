"""Summing up what is read while it comes, when the bytes are still in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from isal.isal_zlib import crc32_combine

from shardckpt.storage.base import Read, Storage


@runtime_checkable
class SummingStorage(Storage, Protocol):
    """A place that sums up what it reads."""

    def read_summed(self, reads: Sequence[Read]) -> list[int]:
        """As `read_into`; gives for each read the CRC-32, as of zlib, of what has come."""
        ...


def sums_of(reads: Sequence[Read], pieces: Iterable[tuple[int, int]]) -> list[int]:
    """The CRC of each read, from (CRC, bytes) of the buffers of their runs, one after the other (`merge`)."""
    found, remaining = [0] * len(reads), iter(pieces)
    for number in sorted(range(len(reads)), key=lambda number: (reads[number].key, reads[number].offset)):
        crc, left = 0, memoryview(reads[number].into).nbytes
        while left:
            other, nbytes = next(remaining)
            crc, left = crc32_combine(crc, other, nbytes), left - nbytes
        found[number] = crc
    return found
