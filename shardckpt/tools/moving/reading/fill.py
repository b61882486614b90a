"""Fill windows from the files of a step: near ranges at once, in memory of a fixed size beside the windows."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shardckpt.engine.consolidated.blocks import is_one_run, position
from shardckpt.engine.loading.fetching.fetch import KeyOf
from shardckpt.engine.loading.integrity import sum_among_zeros
from shardckpt.format.checksum import crc32
from shardckpt.storage.base import Read, RenamingStorage, Storage
from shardckpt.storage.transfer.lending import LendingStorage, Lent
from shardckpt.tools.moving.reading.coverage import Coverage
from shardckpt.tools.moving.reading.spread import Need, RecordName, Spread
from shardckpt.tools.moving.seam import Window

_NEAR = 4 << 20
"""Bytes of a window that are filled at once from a file system: what was read is still in the processor's cache when it
is summed up. From an object store all that the budget allows, for it wants many requests at a time."""
_KEPT = 64
"""Files that stay open."""


@dataclass(slots=True)
class _Part:
    """Some bytes of a window, what they are made of, and where that is read to."""

    spread: Spread
    start: int
    into: memoryview
    needs: list[Need]
    places: list[memoryview]

    def sums(self) -> dict[RecordName, int]:
        totals: dict[RecordName, int] = {}
        for need, place in zip(self.needs, self.places, strict=True):
            first, size = need.runs.offsets[0], need.runs.nbytes
            pieces = ((at, size, crc32(place[at - first : at - first + size])) for at in need.runs.offsets)
            total = sum_among_zeros(need.piece.record.nbytes, pieces)
            totals[need.piece.name] = totals.get(need.piece.name, 0) ^ total
        return totals

    def spread_out(self) -> None:
        """Copy to its place what was not read there."""
        whole = np.frombuffer(self.into, dtype=np.uint8)
        for need, place in zip(self.needs, self.places, strict=True):
            if not _is_straight(need):
                block = whole[need.at : need.at + math.prod(need.block)].reshape(need.block)
                shape = need.piece.record.shape
                strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
                block[need.there.slices] = np.ndarray(need.lengths, np.uint8, place, strides=strides)


class Filler:
    """Reads for a source. Any thread may call `fill`, several at once; each call holds at most the budget."""

    def __init__(self, storage: Storage, key_of: KeyOf, *, budget_nbytes: int) -> None:
        self._storage = storage
        self._key_of = key_of
        self._budget = budget_nbytes
        self._at_once = min(_NEAR, budget_nbytes) if isinstance(storage, RenamingStorage) else budget_nbytes
        self.coverage = Coverage()
        self._lock = threading.Lock()
        self._lent: dict[str, Lent] | None = {} if isinstance(storage, LendingStorage) else None

    def fill(self, windows: Iterable[tuple[Spread, Window]]) -> set[str]:
        """Gives the files that turned out to be damaged; `ValueError` if files and record do not agree."""
        damaged: set[str] = set()
        for batch in self._batches(windows):
            self._read([read for part in batch for read in self._reads(part)])
            for part in batch:
                damaged |= self.coverage.add(part.spread, part.start, part.start + len(part.into), part.sums())
                part.spread_out()
        return damaged

    def close(self) -> None:
        for lent in (self._lent or {}).values():
            lent.close()
        self._lent = None

    def _batches(self, windows: Iterable[tuple[Spread, Window]]) -> Iterator[list[_Part]]:
        scratch = memoryview(b"")
        batch, nbytes, used = list[_Part](), 0, 0
        for spread, start, into in _cut(windows, self._at_once):
            needs = list(spread.needs(start, start + len(into)))
            extra = sum(need.runs.span for need in needs if not _is_straight(need))
            if batch and (nbytes + len(into) > self._at_once or used + extra > self._budget):
                yield batch
                batch, nbytes, used = [], 0, 0
            if used + extra > len(scratch):
                if used:
                    yield batch
                    batch, nbytes, used = [], 0, 0
                scratch = memoryview(bytearray(max(extra, min(self._at_once, self._budget))))
            places = []
            for need in needs:
                if _is_straight(need):
                    at = need.at + position(need.block, need.there.offsets)
                    places.append(into[at : at + need.runs.total])
                else:
                    places.append(scratch[used : used + need.runs.span])
                    used += need.runs.span
            batch.append(_Part(spread, start, into, needs, places))
            nbytes += len(into)
        if batch:
            yield batch

    def _reads(self, part: _Part) -> Iterator[Read]:
        for need, place in zip(part.needs, part.places, strict=True):
            yield Read(self._key_of(need.piece.file), need.start, place)

    def _read(self, reads: Sequence[Read]) -> None:
        others = []
        for read in reads:
            lent = self._lend(read.key)
            if lent is None:
                others.append(read)
            else:
                lent.take(read.offset, [read.into], wait=True)
        if others:
            self._storage.read_into(others)

    def _lend(self, key: str) -> Lent | None:
        """A file that stays open while it is read piece by piece."""
        if self._lent is None or not isinstance(self._storage, LendingStorage):
            return None
        with self._lock:
            if key not in self._lent and len(self._lent) < _KEPT:
                try:
                    self._lent[key] = self._storage.lend(key)
                except OSError as error:
                    if error.errno != errno.ENODEV:  # a file system that maps nothing
                        raise
            return self._lent.get(key)


def _is_straight(need: Need) -> bool:
    """Whether it is one run both of the record and of the window."""
    return len(need.runs.offsets) == 1 and is_one_run(need.block, need.lengths)


def _cut(windows: Iterable[tuple[Spread, Window]], nbytes: int) -> Iterator[tuple[Spread, int, memoryview]]:
    for spread, window in windows:
        into = window.into.cast("B")
        for at in range(0, len(into), nbytes):
            yield spread, window.start + at, into[at : at + nbytes]
