"""One subscriber to events: what it is still to be told, and the thread in which it is told that."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any

from shardckpt.engine.events.kinds import Event

_log = logging.getLogger(__name__)

Subscriber = Callable[[Any], object]
"""Called with an `Event`."""

MOST = 1000
"""So many events wait for a subscriber at most: it is not known to hang for ever, and each holds some memory."""


class Listener:
    """A subscriber in a thread of its own: one that hangs, or takes long, keeps nobody else waiting.

    Any thread may tell it something, a signal handler too: it never waits, and takes no lock.
    """

    def __init__(
        self,
        subscriber: Subscriber,
        kinds: tuple[type[Event], ...],
        *,
        patience: timedelta,
        holds: bool,
        on_failure: Callable[[Listener, Event, BaseException], None],
    ) -> None:
        """`patience`: how long it may take over an event; a longer time is a failure, and nobody waits for it then.

        `holds`: whether steps are to stay until it has returned from what it was told of them.
        """
        self.name = _name_of(subscriber)
        self._subscriber, self._kinds, self._holds = subscriber, kinds, holds
        self._patience_s = patience.total_seconds()
        self._on_failure = on_failure
        self._due: deque[Event] = deque()
        """What it was not told yet, after what it is being told."""
        self._bell: SimpleQueue[bool | threading.Event | None] = SimpleQueue()
        """A True for each event, or what is to be set when it has come so far; None ends it."""
        self._since = float("inf")
        """When it was called, if it has not returned."""
        self._left = False
        self._late = False
        """Whether it was reported that it does not return."""
        self._thread = threading.Thread(target=self._run, name="shardckpt-events", daemon=True)
        self._thread.start()

    def hear(self, event: Event) -> None:
        """It is to be told this, if it is of its kinds."""
        if not isinstance(event, self._kinds) or self._left:
            return
        if self._takes_too_long() and not self._late:
            told = tuple(self._due)  # none, if it has returned just now
            self._late = bool(told)
            for late in told[:1]:
                self._on_failure(self, late, TimeoutError(f"it has not returned for {self._patience_s:g} s"))
        if len(self._due) >= MOST:
            text = "the subscriber %s is %d events behind: it is not told of %s of step %d"
            _log.error(text, self.name, MOST, type(event).__name__, event.step)
            return
        self._due.append(event)
        self._bell.put(True)

    def holds(self) -> set[int]:
        """The steps that are to stay for it. Those that it takes too long over, and what waits behind them, are not."""
        if not self._holds or self._takes_too_long():
            return set()
        return {event.step for event in tuple(self._due)}

    def leave(self) -> None:
        """Tell it nothing more, not even what waits."""
        self._left = True
        self._bell.put(None)

    def drain(self, until: float) -> None:
        """Wait until it has heard what it was told so far, but over no event longer than its patience, and not beyond
        `until` (by `time.monotonic`); then it is left behind."""
        heard = threading.Event()
        self._bell.put(heard)
        while not self._left and self._thread is not threading.current_thread():
            now = time.monotonic()
            left_s = min(until, min(self._since, now) + self._patience_s) - now
            if heard.wait(max(0.0, left_s)):
                return
            if left_s <= 0:
                self._left = True
                at = ", ".join(f"{type(event).__name__} of step {event.step}" for event in tuple(self._due))
                _log.error("a subscriber did not return in time; it is left behind: %s, with %s", self.name, at)

    def end(self) -> None:
        """After `drain`: it is told nothing more."""
        self._bell.put(None)
        if not self._left and self._thread is not threading.current_thread():
            self._thread.join()

    def _takes_too_long(self) -> bool:
        return time.monotonic() - self._since > self._patience_s

    def _run(self) -> None:
        while (rung := self._bell.get()) is not None:
            if isinstance(rung, threading.Event):
                rung.set()
                continue
            event, self._since = self._due[0], time.monotonic()
            try:
                if not self._left:
                    self._subscriber(event)
            except BaseException as error:  # SystemExit, too, would end the thread without a word
                self._on_failure(self, event, error)
            finally:
                self._since, self._late = float("inf"), False
                self._due.popleft()


def _name_of(subscriber: Subscriber) -> str:
    """As a person would find it in the program."""
    while isinstance(subscriber, partial):
        subscriber = subscriber.func
    named = subscriber if hasattr(subscriber, "__qualname__") else type(subscriber)
    return f"{named.__module__}.{named.__qualname__}"
