"""The stream of events: those who tell never wait, and what subscribers do harms nobody."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from shardckpt.engine.events.kinds import Event, SubscriberFailed
from shardckpt.engine.events.listener import Listener, Subscriber

_log = logging.getLogger(__name__)

_PATIENCE = timedelta(seconds=5)
"""How long a subscriber may take over an event, and how long `close` waits for it, if nothing else was said."""


class EventStream:
    """One per manager and rank. Any thread may tell; each subscriber is called in a thread of its own.

    So one that hangs, or takes long, keeps nobody waiting. Without any subscriber, telling costs nothing.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._listeners: tuple[Listener, ...] = ()
        self._lock = threading.Lock()

    def subscribe(
        self,
        subscriber: Subscriber,
        *kinds: type[Event],
        patience: timedelta | None = None,
        holds: bool = False,
    ) -> Callable[[], None]:
        """Have it called with every event of these kinds (of all, if none is given) from now on, in their order.

        Call what is given back to end that. `patience`, `holds`: see `Listener`.
        """
        terms: dict[str, Any] = {"patience": patience or _PATIENCE, "holds": holds, "on_failure": self._failed}
        listener = Listener(subscriber, kinds or (Event,), **terms)
        with self._lock:
            self._listeners = (*self._listeners, listener)

        def unsubscribe() -> None:
            with self._lock:
                self._listeners = tuple(each for each in self._listeners if each is not listener)
            listener.leave()

        return unsubscribe

    def tell(self, kind: type[Event], step: int, /, **what: Any) -> None:
        """Something has happened, here and now."""
        if self._listeners:
            event = kind(step=step, rank=self._rank, at=time.time(), **what)
            for listener in self._listeners:
                listener.hear(event)

    def held(self) -> dict[int, str]:
        """The steps that are to stay as long as a callback is at work on them, and why."""
        return {step: f"{each.name} is at work on it" for each in self._listeners for step in each.holds()}

    def close(self, *, limit: timedelta | None = None) -> None:
        """Let subscribers hear what was told so far, each as long as its patience lasts, and all of them no longer than
        the limit; those that hang are left behind. May be called twice."""
        until = float("inf") if limit is None else time.monotonic() + limit.total_seconds()
        for listener in self._listeners:
            listener.drain(until)
        with self._lock:  # only now, so that they have heard of each other's failures
            listeners, self._listeners = self._listeners, ()
        for listener in listeners:
            listener.drain(until)
            listener.end()

    def _failed(self, listener: Listener, event: Event, error: BaseException) -> None:
        """In its thread, or, if it does not return, in that of whoever tells something."""
        what = "%s failed at %s of step %d; no checkpoint is concerned"
        _log.error(what, f"a subscriber failed: {listener.name}", type(event).__name__, event.step, exc_info=error)
        if isinstance(event, SubscriberFailed):
            return
        text = str(error).partition("\n")[0]
        about = {
            "subscriber": listener.name,
            "heard": type(event).__name__,
            "error": text,
            "kind": type(error).__name__,
        }
        told = SubscriberFailed(step=event.step, rank=self._rank, at=time.time(), **about)
        for other in self._listeners:
            if other is not listener:
                other.hear(told)
