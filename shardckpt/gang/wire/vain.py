"""Waiting for ranks some of which may have ended: then that is in vain, and need not go on until the deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from datetime import timedelta
from typing import TypeAlias

from shardckpt.gang.wire.messages import ranks_text

_LOOK_S = 0.25
"""How often whoever waits looks whether that is in vain."""

Ended: TypeAlias = Callable[[], AbstractSet[int]]
"""Tells which ranks have ended since."""


def nobody() -> AbstractSet[int]:
    """Where that cannot be told."""
    return frozenset()


class VainError(ConnectionError):
    """What was waited for cannot come any more: the processes of `ranks` have ended. The client was abandoned."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self.ranks = frozenset(ranks)
        super().__init__(f"{ranks_text(self.ranks)} was killed, or has ended")


def wait_for(done: threading.Event, within_s: float, ended: Ended) -> bool:
    """Whether it was done in time; `VainError` as soon as somebody is known to have ended."""
    end = time.monotonic() + within_s
    while not done.wait(min(_LOOK_S, max(end - time.monotonic(), 0.0))):
        if time.monotonic() >= end:
            return False
        if ranks := ended():
            raise VainError(ranks)
    return True


class Deadline:
    """When an operation must have ended on rank 0, and, a little later, on the others."""

    def __init__(self, timeout: timedelta) -> None:
        self._began = time.monotonic()
        self._timeout_s = timeout.total_seconds()
        self._grace_s = min(10.0, max(1.0, self._timeout_s / 10))

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._began

    def left_s(self, rank: int) -> float:
        """Seconds until `rank` gives up; never negative."""
        return max(0.0, self._timeout_s + (self._grace_s if rank else 0.0) - self.waited_s)
