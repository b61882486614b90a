"""Large reads of what is not in the page cache: past it or through it, whichever is fastest on that device just now.

Past it is straight from the device: no copy, no read-ahead to be waited for, and nothing of others is put out of the
cache. The memory must lie in pages as the file does. What is in the page cache comes from there, at once.

No way is the fastest one: 2026-11-27, 2 cores, ext4 on a virtual disk, GB/s with a CRC-32 of what was read, medians
by turns. With much other work on the machine 0.43 through the cache and 1.38 past it; with none 2.12 and 1.40.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from dataclasses import dataclass

LEAST = 1 << 20
"""Bytes for which it is worth while."""
_PAGE = mmap.PAGESIZE
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # Linux 4.14


@dataclass(frozen=True, slots=True)
class Way:
    """How to read: `past` the page cache or through it, and by how many threads at most at once (0: by all)."""

    past: bool
    at_once: int = 0


WAYS = (Way(past=True), Way(past=False), Way(past=False, at_once=2))
_TRIED, _KEPT = 96 << 20, 2 << 30
"""Bytes that are read one way to learn how fast that is, and those that go the fastest way before the others are tried
again: so ways that take twice as long cost 9 per cent."""
_PATIENCE_S = 1.0
"""How long a read waits at most for those before it: an interrupt may have ended one that was never counted out."""


class Ways:
    """The ways to read of one device, tried by turns; most goes the one that was the fastest when each was last tried.

    What counts is how many bytes come while at least one read is under way, not what else is done with them. Any thread
    calls it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rates = [0.0] * len(WAYS)
        """Bytes a second, when last tried."""
        self._refused = set[int]()
        self._trials = list(range(1, len(WAYS)))
        """Ways to be tried after this one."""
        self._way, self._left, self._is_trial = 0, _TRIED, True
        """Where reads go now, for how many bytes more, and whether only to learn how fast that is."""
        self._under_way = [0] * len(WAYS)
        self._nbytes, self._busy_s, self._since = 0, 0.0, 0.0
        """Bytes that came this way, the time that it took, and when the reads that are under way began."""

    def begin(self, nbytes: int) -> int:
        """The way, of `WAYS`, that a read of so many bytes goes now; waits where enough are under way."""
        with self._changed:
            if self._left <= 0 and self._nbytes:
                self._turn()
            self._left -= nbytes
            way = self._way
            most = WAYS[way].at_once
            self._changed.wait_for(lambda: not most or self._under_way[way] < most, _PATIENCE_S)
            if way == self._way and not self._under_way[way]:
                self._since = time.monotonic()
            self._under_way[way] += 1
            return way

    def end(self, way: int, nbytes: int, *, refused: bool = False) -> None:
        """Hear that a read is over, and how much it brought; or that the file system has no such reads."""
        with self._changed:
            now = time.monotonic()
            self._under_way[way] -= 1
            if way == self._way:
                self._nbytes += nbytes
                if not self._under_way[way]:
                    self._busy_s += now - self._since
            elif not any(count for other, count in enumerate(self._under_way) if other != self._way):
                # The last read of an earlier turn: from now on this way has the device for itself.
                self._nbytes, self._busy_s, self._since = 0, 0.0, now
            if refused:
                self._refused.add(way)
                if way == self._way:
                    self._turn()
            self._changed.notify_all()

    def _turn(self) -> None:
        now = time.monotonic()
        busy_s = self._busy_s + (now - self._since if self._under_way[self._way] else 0.0)
        self._rates[self._way] = self._nbytes / busy_s if busy_s else 0.0
        if not self._is_trial:
            self._trials = [way for way in range(len(WAYS)) if way != self._way]
        self._trials = [way for way in self._trials if way not in self._refused]
        self._is_trial = bool(self._trials)
        if self._trials:
            self._way, self._left = self._trials.pop(0), _TRIED
        else:
            usable = [way for way in range(len(WAYS)) if way not in self._refused]  # never those through the cache
            self._way, self._left = max(usable, key=self._rates.__getitem__), _KEPT
        self._nbytes, self._busy_s, self._since = 0, 0.0, now


_ways: dict[int, Ways] = {}
"""By the number of the device."""
os.register_at_fork(after_in_child=_ways.clear)  # somebody may have held a lock


def read_large(file: int, into: memoryview, offset: int) -> int:
    """Fill the beginning of the memory with the file's bytes from there on, and give how many have come.

    As many as can be had so: none where the memory or the offset lies otherwise, the file system has no such reads, or
    it is not worth while. The caller reads the rest as ever, and meets its errors there.
    """
    if len(into) < LEAST or offset % _PAGE or not _NOWAIT or _address(into) % _PAGE:
        return 0
    try:
        done = _cached(file, into, offset)
        return done if done % _PAGE else done + _uncached(file, into[done:], offset + done)
    except OSError:
        return 0


def _cached(file: int, into: memoryview, offset: int) -> int:
    try:  # of the first page: to find nothing of 8 MiB takes 2 ms
        found = os.preadv(file, [into[:_PAGE]], offset, _NOWAIT)
        return found and os.preadv(file, [into], offset, _NOWAIT)
    except BlockingIOError:
        return 0


def _uncached(file: int, into: memoryview, offset: int) -> int:
    whole = into[: len(into) // _PAGE * _PAGE]
    if len(whole) < LEAST:
        return 0
    ways = _ways.setdefault(os.fstat(file).st_dev, Ways())
    way, done, refused = ways.begin(len(whole)), 0, False
    try:
        done = _direct(file, whole, offset) if WAYS[way].past else os.preadv(file, [whole], offset)
    except OSError:  # a file system that has no such reads
        refused = WAYS[way].past
        raise
    finally:
        ways.end(way, done, refused=refused)
    return done


def _direct(file: int, into: memoryview, offset: int) -> int:
    past = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        return os.preadv(past, [into], offset)
    finally:
        os.close(past)


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
