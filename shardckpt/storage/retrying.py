"""Trying again what failed for a passing reason: a single call, or all calls of a storage."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import tenacity

from shardckpt.storage.base import Buffer, Storage
from shardckpt.storage.transfer.fingerprint import fingerprint, stores
from shardckpt.storage.wrapping import Operation, StorageWrapper

T = TypeVar("T")

_log = logging.getLogger(__name__)

# What may succeed if nothing but time has passed. Not EIO: a device that lost data does not find it again, and after a
# failed fsync trying again is how data is lost silently. Not ENOSPC, EACCES, EROFS: they wait for a person.
_PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,  # s3fs: 503 SlowDown, ServiceUnavailable; 409
        errno.ESTALE,  # NFS: looked up anew by the next try
        errno.ETIMEDOUT,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EPROTO,  # an answer that the server did not give: something in between did
        getattr(errno, "EREMOTEIO", errno.ETIMEDOUT),  # s3fs: 500 InternalError
    }
)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later. ConnectionError and TimeoutError are; see `_PASSING`."""
    return isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno in _PASSING)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long. Waits double from `first_wait`, each drawn at random between 0 and that (full jitter)."""

    tries: int = 8
    first_wait: timedelta = timedelta(seconds=0.2)
    longest_wait: timedelta = timedelta(seconds=10)
    deadline: timedelta = timedelta(seconds=60)
    """From the first try of an operation: none is begun after it. It does not end a try that hangs; the storage's own
    timeouts must."""


class Retrier:
    """Repeats calls that fail for a passing reason, and counts how often. Safe to use from several threads."""

    def __init__(self, policy: RetryPolicy | None = None) -> None:
        self.policy = policy or RetryPolicy()
        self._over = threading.Event()
        # Not a number under a lock: one held at the moment of a fork would stay held in the child for ever.
        self._repeated: list[None] = []

    @property
    def retries(self) -> int:
        """How many tries were made beyond the first ones."""
        return len(self._repeated)

    def call(self, work: Callable[[], T], *, what: str) -> T:
        """Do it, again and again if need be; the last error if nothing helps. `what` is for the log."""
        policy = self.policy
        first_s, longest_s = policy.first_wait.total_seconds(), policy.longest_wait.total_seconds()
        over = self._over
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(policy.tries),
                tenacity.stop_before_delay(policy.deadline),
                tenacity.stop_when_event_set(over),
            ),
            wait=tenacity.wait_random_exponential(multiplier=first_s, max=longest_s),
            sleep=tenacity.sleep_using_event(over),
            before_sleep=lambda state: self._note(what, state),
            reraise=True,
        )(work)

    def stop(self, *, for_good: bool) -> None:
        """End the waits under way in other threads, which then fail with their last error."""
        self._over.set()
        if not for_good:
            self._over = threading.Event()

    def _note(self, what: str, state: tenacity.RetryCallState) -> None:
        self._repeated.append(None)
        error = state.outcome.exception() if state.outcome else None
        wait_s = state.next_action.sleep if state.next_action else 0.0
        _log.warning("try %d of %s failed (%s); again in %.1f s", state.attempt_number, what, error, wait_s)


def retries_of(storage: Storage) -> int:
    """How many tries a storage has made beyond the first ones, in its life; 0 if it does not count them."""
    return int(getattr(storage, "retries", 0))


class RetryingStorage(StorageWrapper):
    """Repeats idempotent operations and puts; never a rename or a sync of a folder.

    A rename whose answer was lost must be looked at by the one who knows what it was for, and a failed fsync is final.
    A put is repeated only if `parts` is a sequence: an iterator cannot be run through twice.
    """

    def __init__(self, inner: Storage, policy: RetryPolicy | None = None) -> None:
        super().__init__(inner)
        self._retrier = Retrier(policy)

    @property
    def retries(self) -> int:
        """How many tries were made beyond the first ones, over all operations and threads, here and by `inner`."""
        return self._retrier.retries + super().retries

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        return self._repeat(operation, call) if operation.idempotent else call()

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        if not isinstance(parts, Sequence):
            return self.inner.put(key, parts)
        may_have_arrived = False

        def put_once() -> int:
            nonlocal may_have_arrived
            try:
                return self.inner.put(key, parts)
            except FileExistsError:
                # Refused: by our own earlier try, whose answer was lost, exactly if what is there is what we sent.
                content = fingerprint(parts)
                if not (may_have_arrived and stores(self.inner, key, content)):
                    raise
                return content.nbytes
            except OSError as error:
                may_have_arrived = may_have_arrived or is_transient(error)
                raise

        return self._repeat(Operation("put", (key,)), put_once)

    def close(self) -> None:
        """Also ends the waits between tries: what is being retried in other threads fails with its last error."""
        self._retrier.stop(for_good=True)
        self.inner.close()

    def _repeat(self, operation: Operation, call: Callable[[], T]) -> T:
        return self._retrier.call(call, what=f"{operation.name} {operation.key!r} in {self.url}")
