"""How far a load is: the bytes of what is being done, counted piece by piece while somebody watches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from shardckpt.format.checksum import combine
from shardckpt.storage.base import Read, Storage
from shardckpt.storage.transfer.several import for_each
from shardckpt.storage.transfer.summing import SummingStorage

_BATCH = 64 << 20
"""Bytes after which a watched read says how far it is. Two batches are under way at once: together they are as many
requests as a storage has under way for one large read (`Transfers.concurrency` of `request_nbytes`)."""


class Meter:
    """What one rank is doing, and how much of it is done. Written by the threads that do it, read by any.

    As long as it is not watched it is not kept, and costs nothing: nobody adds up what there is to do.
    """

    def __init__(self) -> None:
        self.watched = False
        self.phase = "opening"
        self.total = 0
        """Bytes of this phase; 0 if that is not known."""
        self.done = 0
        self.began = time.monotonic()
        """When this phase began."""
        self._lock = threading.Lock()

    def begin(self, phase: str, sizes: Iterable[int]) -> None:
        """From now on it is this that is done, with pieces of these sizes, in bytes."""
        if self.watched:
            total = sum(sizes)
            with self._lock:
                self.phase, self.total, self.done, self.began = phase, total, 0, time.monotonic()

    def add(self, nbytes: int) -> None:
        """So many bytes more are done."""
        if self.watched:
            with self._lock:
                self.done += nbytes


UNWATCHED = Meter()
"""For those of whom nobody wants to know."""


def read_metered(storage: Storage, reads: Sequence[Read], meter: Meter) -> list[int]:
    """As `storage.read_into`, which says nothing before all is there: batch by batch, if somebody watches. Gives the
    CRC of each read where the storage sums up what comes, else nothing."""
    if not meter.watched:
        return _read(storage, reads)
    found: list[list[tuple[int, int, int]]] = [[] for _ in reads]

    def read(batch: list[tuple[int, int, Read]]) -> None:
        sums = _read(storage, [part for _, _, part in batch])
        for (number, start, part), crc in zip(batch, sums, strict=False):
            found[number].append((start, crc, len(part.into)))
        meter.add(sum(len(part.into) for _, _, part in batch))

    for_each(_batches(reads), read, threads=2)
    if not isinstance(storage, SummingStorage):
        return []
    return [combine((crc, nbytes) for _, crc, nbytes in sorted(pieces))[0] for pieces in found]


def _read(storage: Storage, reads: Sequence[Read]) -> list[int]:
    if isinstance(storage, SummingStorage):
        return storage.read_summed(reads)
    storage.read_into(reads)
    return []


def _batches(reads: Sequence[Read]) -> Iterator[list[tuple[int, int, Read]]]:
    """Which read, from which of its bytes on, and a part of it. Neighbours stay together, as the storage reads them by
    one request."""
    batch, room = list[tuple[int, int, Read]](), _BATCH
    for number in sorted(range(len(reads)), key=lambda number: (reads[number].key, reads[number].offset)):
        read, start = reads[number], 0
        while start < len(read.into):
            piece = read.into[start : start + room]
            batch.append((number, start, Read(read.key, read.offset + start, piece)))
            start, room = start + len(piece), room - len(piece)
            if not room:
                yield batch
                batch, room = [], _BATCH
    if batch:
        yield batch
