"""Large reads of what is not in the page cache: past it or through it, whichever is faster on that device just now.

Past it is straight from the device: no copy, no read-ahead to be waited for, and nothing of others is put out of the
cache. The memory must lie in pages as the file does. What is in the page cache comes from there, at once.

Neither way is the faster one: 2026-11-27, 2 cores, ext4 on a virtual disk, GB/s with a CRC-32 of what was read, medians
by turns. With much other work on the machine 0.43 through the cache and 1.38 past it; with none 2.12 and 1.40.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import time

LEAST = 1 << 20
"""Bytes for which it is worth while."""
_PAGE = mmap.PAGESIZE
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # Linux 4.14
_TRIED, _KEPT = 64 << 20, 1 << 30
"""Bytes that are read one way to learn how fast that is, and those that go the faster way before the other is tried
again: so a way that takes twice as long costs 6 per cent."""


class Ways:
    """Two ways to read of one device, tried by turns; most goes the one that was faster when each was last tried.

    What counts is how long the reads of one thread take, which compares for as long as the number of threads does.
    Any thread calls it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pace: list[float | None] = [None, None]
        """Of each way: seconds for a byte, when last tried."""
        self._way, self._left, self._is_trial = 0, _TRIED, True
        """Where reads go now, for how many bytes more, and whether only to learn how fast that is."""
        self._nbytes, self._seconds = 0, 0.0
        """Of the reads that went there since and are over."""

    def next(self, nbytes: int) -> int:
        """The way, 0 or 1, that a read of so many bytes goes now."""
        with self._lock:
            if self._left <= 0 and self._nbytes:
                self._turn()
            self._left -= nbytes
            return self._way

    def took(self, way: int, nbytes: int, seconds: float) -> None:
        """Hear how long a read has taken, from its beginning to its end."""
        with self._lock:
            if way == self._way:  # else it was one of the last of an earlier turn
                self._nbytes += nbytes
                self._seconds += seconds

    def _turn(self) -> None:
        self._pace[self._way] = self._seconds / self._nbytes
        self._nbytes, self._seconds = 0, 0.0
        past, through = self._pace
        if self._is_trial and past is not None and through is not None:
            self._way, self._left, self._is_trial = int(through < past), _KEPT, False
        else:
            self._way, self._left, self._is_trial = 1 - self._way, _TRIED, True


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
    way, began = ways.next(len(whole)), time.monotonic()
    try:
        done = os.preadv(file, [whole], offset) if way else _direct(file, whole, offset)
    except OSError:  # a file system that has no such reads
        ways.took(way, len(whole), math.inf)
        raise
    ways.took(way, done, time.monotonic() - began)
    return done


def _direct(file: int, into: memoryview, offset: int) -> int:
    past = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        return os.preadv(past, [into], offset)
    finally:
        os.close(past)


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
