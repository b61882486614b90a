"""How fast objects are deleted: many in one request, and no faster than asked for or than the place bears."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from shardckpt.storage.objects.translate import service_codes
from shardckpt.storage.transfer.pacing import Pacer

_PER_REQUEST = 1000
"""The most that S3 takes in one."""
_START = 1000.0
"""Objects per second, where there was no limit and the place has asked to be slow."""
_LEAST = 10.0
_FASTER = 1.25
_FREE = 100_000.0
"""From here on there is no limit again, if none was given."""


class DeletePace(Pacer):
    """A limit to the objects deleted per second, of all threads of a storage together.

    When the place says that it is too much (S3: 503 SlowDown) the rate is halved, for all of them; each request that
    succeeds makes it a quarter faster again, up to the limit.
    """

    def __init__(self, limit: float | None) -> None:
        """`limit`: objects per second; None: as fast as the place takes them. `ValueError` if it is none."""
        if limit is not None and not (limit > 0 and math.isfinite(limit)):
            raise ValueError(f"deletes_per_second is how many objects may be deleted in a second, not {limit!r}")
        super().__init__(limit or _FREE)
        self._limit = limit
        self._rate = limit or math.inf

    @property
    def rate(self) -> float:
        """Objects per second, now."""
        return self._rate

    def batches(self, paths: Iterable[str]) -> Iterator[list[str]]:
        """As many as go into one request, and are due within a second."""
        remaining = iter(paths)
        while batch := list(islice(remaining, max(1, int(min(_PER_REQUEST, self._rate))))):
            yield batch

    def request(self, delete: Callable[[Any, Sequence[str]], None], fs: Any, *, paths: Sequence[str]) -> None:
        """`delete` these, by one request, when they are due."""
        self.take(len(paths))
        try:
            delete(fs, paths)
        except Exception as error:
            if _is_too_fast(error):
                self._slow_down()
            raise
        self._go_faster()

    def _slow_down(self) -> None:
        with self._lock:
            self._rate = max(min(_LEAST, self._limit or _LEAST), min(self._rate, 2 * _START) / 2)

    def _go_faster(self) -> None:
        with self._lock:
            rate = self._rate * _FASTER
            self._rate = min(rate, self._limit) if self._limit else (rate if rate < _FREE else math.inf)


def _is_too_fast(error: Exception) -> bool:
    """Whether a place has refused a request for coming too soon."""
    busy = isinstance(error, OSError) and error.errno == errno.EBUSY
    return busy or bool({"SlowDown", "ServiceUnavailable", "TooManyRequests", "503", "429"} & set(service_codes(error)))
