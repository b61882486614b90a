"""A limit to how many bytes go out per second."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

from shardckpt.storage.base import Buffer
from shardckpt.storage.transfer.ranges import as_bytes

_now, _sleep = time.monotonic, time.sleep

_BURST_S = 0.1
"""Time not used is made up for, but no more of it than this."""
_PIECE = 2 << 20
_PAGE = 4096


class Pacer:
    """A token bucket. Any thread may take from it; together they take no more than `rate` bytes per second."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._due = float("-inf")
        """When the bytes taken so far may all be gone."""
        self.piece = max(_PAGE, min(_PIECE, int(rate * _BURST_S)) // _PAGE * _PAGE)
        """Bytes that are let go at a time: whole pages, and so few that nobody waits long at once."""

    def take(self, nbytes: int) -> None:
        """Come back when so many more bytes may go."""
        with self._lock:
            now = _now()
            due = max(self._due, now - _BURST_S)
            self._due = due + nbytes / self._rate
        if due > now:
            _sleep(due - now)

    def pace(self, parts: Iterable[Buffer]) -> Iterator[memoryview]:
        """The same bytes, in pieces, each when it may go."""
        for part in parts:
            view = as_bytes(part)
            for start in range(0, len(view), self.piece):
                piece = view[start : start + self.piece]
                self.take(len(piece))
                yield piece
