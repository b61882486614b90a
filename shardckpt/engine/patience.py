"""Storage that does not answer: a call into it may block for ever, and no thread can be made to come back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import TypeVar

_T = TypeVar("_T")


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
