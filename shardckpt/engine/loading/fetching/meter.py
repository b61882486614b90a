"""How far a load is: the bytes of what is being done, counted piece by piece while somebody watches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from shardckpt.storage.base import Read, Storage
from shardckpt.storage.transfer.several import for_each

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


def read_metered(storage: Storage, reads: Sequence[Read], meter: Meter) -> None:
    """As `storage.read_into`, which says nothing before all is there: batch by batch, if somebody watches."""
    if not meter.watched:
        storage.read_into(reads)
        return

    def read(batch: list[Read]) -> None:
        storage.read_into(batch)
        meter.add(sum(len(each.into) for each in batch))

    for_each(_batches(reads), read, threads=2)


def _batches(reads: Iterable[Read]) -> Iterator[list[Read]]:
    """Neighbours stay together, as the storage reads them by one request."""
    batch, room = list[Read](), _BATCH
    for read in sorted(reads, key=lambda read: (read.key, read.offset)):
        start = 0
        while start < len(read.into):
            piece = read.into[start : start + room]
            batch.append(Read(read.key, read.offset + start, piece))
            start, room = start + len(piece), room - len(piece)
            if not room:
                yield batch
                batch, room = [], _BATCH
    if batch:
        yield batch
