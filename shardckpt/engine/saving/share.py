"""Who writes which bytes of a file that several ranks hold alike. Pure; every rank comes to the same answer alone.

Data-parallel ranks hold `model.<r>.pt` and `replicated.<r>.pt` alike, to the last byte: the layout follows from names,
shapes and dtypes, and their values are compared before the commit. So each can put a stretch of it. On a file system
the stretches go into one file, on an object store into the parts of one upload. Where the storage can do neither, a
file is put by one rank, and different files by different ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardckpt.format.manifest import Home
from shardckpt.storage.base import RenamingStorage, SharedPuts, Storage

LEAST = 4 << 20
"""Bytes that make another writer worth its while, on a file system."""
LEAST_OF_UPLOAD = 8 << 20
"""The same on an object store, where the parts of an upload cannot be smaller than 5 MiB."""
_NUMBERS = 10_000
"""Of parts in an upload."""
_GRAIN = 1 << 20
"""Stretches begin at multiples of this: whole pages, and whole blocks of any file system."""


@dataclass(frozen=True, slots=True)
class Share:
    """The stretch of one file that one rank puts: bytes `start` to `end` of the part before the tail."""

    start: int
    end: int
    tail: bool
    """Whether it puts the tail as well; then `end` is where the tail begins. Exactly one rank does."""
    whole: bool
    """Whether nobody else puts anything."""
    numbers: range = range(1, _NUMBERS + 1)
    """In an upload, the numbers that the parts of this stretch may have."""

    @property
    def range(self) -> tuple[int, int]:
        return self.start, self.end

    @property
    def is_empty(self) -> bool:
        return self.start == self.end and not self.tail

    def covers(self, start: int, end: int) -> bool:
        return self.start <= start and end <= self.end

    def touches(self, start: int, end: int) -> bool:
        return start < self.end and end > self.start


def least_share(storage: Storage) -> int | None:
    """From how many bytes on another rank shares the writing of a file; None if only one can write it."""
    if isinstance(storage, RenamingStorage):
        return LEAST
    return LEAST_OF_UPLOAD if isinstance(storage, SharedPuts) else None


def share_out(nbytes: int, *, home: Home, sharers: int, place: int, least: int | None) -> Share:
    """The share of the rank at `place` among the `sharers` of a file with `nbytes` before its tail.

    `least`: see `least_share`. The stretches are even; the tails of a shard's files go to different ranks.
    """
    owner = (0 if home != "replicated" else 1) % sharers
    count = min(sharers, max(1, nbytes // least)) if least is not None else 1
    number = (place - owner - 1) % sharers - (sharers - count)  # the owner has the last one
    if number < 0:
        return Share(0, 0, tail=False, whole=False)
    bounds = [nbytes * i // count // _GRAIN * _GRAIN for i in range(count)] + [nbytes]
    room = _NUMBERS // count
    numbers = range(number * room + 1, (number + 1) * room + 1)
    return Share(bounds[number], bounds[number + 1], tail=number == count - 1, whole=count == 1, numbers=numbers)
