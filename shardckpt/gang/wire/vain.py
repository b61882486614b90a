"""Waiting for ranks some of which may have ended: then that is in vain, and need not go on until the deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
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
