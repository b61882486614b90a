"""Who writes which bytes of a file that several ranks hold alike. Pure; every rank comes to the same answer alone.

Data-parallel ranks hold `model.<r>.pt` and `replicated.<r>.pt` alike, to the last byte: the layout follows from names,
shapes and dtypes, and their values are compared before the commit. So each can put a stretch of it. On a file system
the stretches go into one file; an object is put by one rank, and different files by different ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardckpt.format.manifest import Home

LEAST = 4 << 20
"""Bytes that make another writer worth its while."""
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


def share_out(nbytes: int, *, home: Home, sharers: int, place: int, in_ranges: bool) -> Share:
    """The share of the rank at `place` among the `sharers` of a file with `nbytes` before its tail.

    `in_ranges`: whether the storage can put ranges of a file. The stretches are even; the tails of a shard's files go
    to different ranks.
    """
    owner = (0 if home != "replicated" else 1) % sharers
    count = min(sharers, max(1, nbytes // LEAST)) if in_ranges else 1
    number = (place - owner - 1) % sharers - (sharers - count)  # the owner has the last one
    if number < 0:
        return Share(0, 0, tail=False, whole=False)
    bounds = [nbytes * i // count // _GRAIN * _GRAIN for i in range(count)] + [nbytes]
    return Share(bounds[number], bounds[number + 1], tail=number == count - 1, whole=count == 1)
