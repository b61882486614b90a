"""The save thread may hang in the middle of Python, where no deadline of an exchange or of the storage can end it.

Then its right to act for the save is taken away (`Lease`), and another thread takes its place. When the one that hung
goes on after all, it can neither speak in the gang, where another conversation is going on by then, nor put a record in
force that was given up: both are done only while the lease is held, which cannot be taken away meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from shardckpt.engine.patience import LAST_WORD, Limit
from shardckpt.gang.base import Fold, Gang, Json
from shardckpt.gang.wire.mailbox import Line

_GRACE_S = 3.0
"""How long a thread may do nothing that can be seen, after all its deadlines."""


class LeaseTakenError(RuntimeError):
    """The save that this thread was at was given up while it hung."""


class Lease:
    """Of one save; held by its thread for each act of the kind that must not come late."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._taken = False
        self._seen = time.monotonic()
        self.may_be_in_force = False
        """Whether others may commit the step, or this rank may have, without anything more that this thread does."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """For an act that has a deadline of its own. `LeaseTakenError` if it may not be done any more."""
        with self._lock:
            if self._taken:
                raise LeaseTakenError("this save was given up, because its thread hung")
            self.beat()
            try:
                yield
            finally:
                self.beat()

    def beat(self) -> None:
        """The thread is alive, and begins something that has a deadline."""
        self._seen = time.monotonic()

    @property
    def idle_s(self) -> float:
        return time.monotonic() - self._seen

    def take(self, idle_s: float) -> bool:
        """Take it away if nothing has been seen of its thread for so long. Waits while it is held."""
        with self._lock:
            self._taken = self._taken or self.idle_s >= idle_s
            return self._taken


class Watch:
    """Looks after the thread of one save, from a thread of its own, until it is over."""

    def __init__(self, lease: Lease, limit: Limit, give_up: Callable[[], None]) -> None:
        self._lease, self._limit, self._give_up = lease, limit, give_up
        self._end = limit.end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardckpt-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._lease.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def committed(self) -> None:
        """What is left to be done is not bound by the deadline of the save."""
        self._end = None
        self._lease.beat()

    def _run(self) -> None:
        while not self._over.wait(self._left_s()):
            if self._left_s() <= 0 and self._lease.take(_GRACE_S):  # what was held until now is no hang
                self._give_up()
                return

    def _left_s(self) -> float:
        """Until it hangs if nothing is seen of it before. Each act of its own, and each exchange, ends in `timeout`."""
        idle = self._lease.idle_s
        left = self._limit.timeout.total_seconds() + _GRACE_S - idle
        if self._end is not None:
            late = self._end + LAST_WORD.total_seconds() - time.monotonic()
            left = min(left, late + _GRACE_S if late > 0 else _GRACE_S - idle)
        return left


class LeasedGang:
    """A gang, for as long as the lease lasts. It does not belong to whoever has it: `close` does nothing."""

    def __init__(self, gang: Gang, lease: Lease) -> None:
        self._gang, self._lease = gang, lease

    @property
    def name(self) -> str:
        return self._gang.name

    @property
    def rank(self) -> int:
        return self._gang.rank

    @property
    def size(self) -> int:
        return self._gang.size

    def enter(self, scope: str, *, timeout: timedelta, skipped: Sequence[str] = ()) -> None:
        with self._lease.held():
            self._gang.enter(scope, timeout=timeout, skipped=skipped)

    def gather(self, value: Json, *, timeout: timedelta, fold: Fold | None = None) -> list[Json] | None:
        with self._lease.held():
            return self._gang.gather(value, timeout=timeout, fold=fold)

    def broadcast(self, value: Json, *, timeout: timedelta) -> Json:
        with self._lease.held():
            return self._gang.broadcast(value, timeout=timeout)

    def subgang(self, ranks: Sequence[int], name: str) -> Gang | None:
        with self._lease.held():
            return self._gang.subgang(ranks, name)

    def line(self) -> Line | None:
        return self._gang.line()

    def close(self) -> None:
        """The saver closes the gang."""
