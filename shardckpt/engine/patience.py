"""Storage that does not answer: a call into it may block for ever, and no thread can be made to come back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

_T = TypeVar("_T")

LAST_WORD = timedelta(seconds=2)
"""How long after its end the ranks of a save still listen to each other, so that all hear who was late."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How long a save may take: `timeout` in one phase, and all of it no longer than until `end`, if there is one."""

    timeout: timedelta
    end: float | None = None
    """By `time.monotonic`."""

    @classmethod
    def of(cls, timeout: timedelta, deadline: timedelta | None) -> Limit:
        """That of a save that begins now."""
        return cls(timeout, None if deadline is None else time.monotonic() + deadline.total_seconds())

    @property
    def work(self) -> timedelta:
        """What this rank may take for its own work in a phase that begins now."""
        if self.end is None:
            return self.timeout
        return min(self.timeout, max(timedelta(0), timedelta(seconds=self.end - time.monotonic())))

    @property
    def talk(self) -> timedelta:
        """How long it may take the others to come to the end of such a phase."""
        return self.timeout if self.end is None else min(self.timeout, self.work + LAST_WORD)

    def check(self) -> None:
        """`TimeoutError` if it is over."""
        if self.end is not None and time.monotonic() > self.end:
            raise TimeoutError("the deadline that the save was given has passed")


def within(timeout: timedelta, work: Callable[[], _T], *, what: str) -> _T:
    """The result of `work`, or `TimeoutError` if there is none in time; called on any thread but the training's.

    The work runs in a thread of its own, which is left behind when time is up. What it may still do then must be
    harmless: it writes below an attempt that nobody will commit, from memory that nobody reuses.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="shardckpt-storage", daemon=True).start()
    try:
        return future.result(timeout.total_seconds())
    except FutureTimeoutError:
        if future.done():  # the work's own TimeoutError
            raise
        raise TimeoutError(
            f"{what} took longer than {timeout.total_seconds():.3g} s: the storage does not answer, or needs a longer "
            "timeout"
        ) from None
