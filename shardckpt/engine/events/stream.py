"""The stream of events: those who tell never wait, and what subscribers do harms nobody."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

from shardckpt.engine.events.kinds import Event

_log = logging.getLogger(__name__)

Subscriber = Callable[[Event], object]

_PATIENCE = timedelta(seconds=5)
"""How long `close` waits for subscribers to hear what was told."""


class EventStream:
    """One per manager and rank. Any thread may tell; subscribers are called one after the other in a thread of its own.

    So a subscriber that hangs, or takes long, keeps nothing but other subscribers waiting. The thread starts with the
    first subscriber; without any, telling costs nothing.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._subscribers: tuple[Subscriber, ...] = ()
        self._lock = threading.Lock()
        self._told: SimpleQueue[Event | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Have it called with every event from now on; call what is given back to end that."""
        with self._lock:
            self._subscribers = (*self._subscribers, subscriber)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shardckpt-events", daemon=True)
                self._thread.start()

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers = tuple(each for each in self._subscribers if each is not subscriber)

        return unsubscribe

    def tell(self, kind: type[Event], step: int, /, **what: Any) -> None:
        """Something has happened, here and now."""
        if self._thread is not None and self._subscribers:
            self._told.put(kind(step=step, rank=self._rank, at=time.time(), **what))

    def close(self) -> None:
        """Let subscribers hear what was told so far; one that hangs is left behind. May be called twice."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is None or thread is threading.current_thread():
            return
        self._told.put(None)
        thread.join(_PATIENCE.total_seconds())
        if thread.is_alive():
            _log.warning("a subscriber to events did not return in time; it is left behind")

    def _run(self) -> None:
        while (event := self._told.get()) is not None:
            for subscriber in self._subscribers:
                try:
                    subscriber(event)
                except Exception:
                    _log.exception("a subscriber failed at %s of step %d", type(event).__name__, event.step)
