"""Messages between ranks as keys of a `torch.distributed` store, with every call under a watchdog.

A TCPStore call can block for ever when packets are dropped, whatever timeout it is given. So each call runs
in a worker thread that owns a client of its own; a call that overruns is abandoned together with its thread
and client, which costs one thread until the kernel gives up, and not the job.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from shardckpt.gang.base import Json
from shardckpt.gang.wire.ending import close_at_the_end, join_at_the_end
from shardckpt.gang.wire.messages import decode, pack
from shardckpt.gang.wire.vain import Ended, VainError, nobody, wait_for

_T = TypeVar("_T")
_C = TypeVar("_C")

LAST_S = 0.3
"""How long the others may still take when it is known that somebody will not come."""
_SLACK_S = 1.0
"""How much longer than its own timeout a store call may take before it is abandoned."""
_END_S = 10.0
"""How long an idle thread may take to end; it does so at once, unless the machine stands still."""


class Store(Protocol):
    """What is used of `torch.distributed.Store`. Every error of torch's stores is a `RuntimeError`."""

    def set(self, key: str, value: str | bytes, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def delete_key(self, key: str, /) -> bool: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def has_extended_api(self) -> bool: ...


class SilentError(TimeoutError):
    """A call did not come back in time; its thread and client were abandoned."""


class _Job(Generic[_C, _T]):
    def __init__(self, act: Callable[[_C], _T]) -> None:
        self._act = act
        self.done = threading.Event()
        self.result: _T
        self.error: BaseException | None = None

    def run(self, client: Callable[[], _C]) -> None:
        try:
            self.result = self._act(client())
        except BaseException as error:
            # Without the traceback, whose frames would keep the client and its socket as long as the error lives.
            self.error = error.with_traceback(None)
        finally:
            self.done.set()


class Watchdog(Generic[_C]):
    """Runs calls on a client in a thread that has made it and owns it. Used by one thread at a time.

    The thread starts with the first call. It is a daemon: one that hangs does not keep the process from ending.
    """

    def __init__(self, make_client: Callable[[], _C], *, name: str) -> None:
        self._make_client = make_client
        self._name = name
        self._jobs: SimpleQueue[_Job[_C, Any] | None] | None = None
        self._thread: threading.Thread | None = None
        self._abandoned = False

    def call(self, act: Callable[[_C], _T], *, within_s: float, ended: Ended = nobody) -> _T:
        """`act(client)`, or its error; `SilentError` when it takes longer, and at once after that until `renew`.

        `VainError` as soon as `ended` names somebody; the next call has a fresh client.
        """
        if self._abandoned:
            raise SilentError("an earlier call to the store did not come back")
        if self._jobs is None:
            self._jobs = SimpleQueue()
            self._thread = threading.Thread(
                target=_work, args=(self._make_client, self._jobs), name=self._name, daemon=True
            )
            join_at_the_end(self._thread)
            close_at_the_end(self)
            self._thread.start()
        job = _Job(act)
        self._jobs.put(job)
        try:
            finished = wait_for(job.done, within_s, ended)
        except BaseException:  # Ctrl-C, too: the client is still busy with what nobody waits for any more
            self.abandon()
            self.renew()
            raise
        if not finished:
            self.abandon()
            raise SilentError(f"the store did not answer within {within_s:.3g} s")
        if job.error is not None:
            raise job.error
        return job.result

    def abandon(self) -> None:
        """Never use this client again; the thread ends as soon as its present call does."""
        self._abandoned = True
        if self._jobs is not None:
            self._jobs.put(None)
        self._jobs = self._thread = None

    def renew(self) -> None:
        """Allow calls again after an abandonment, with a fresh client."""
        self._abandoned = False

    def close(self) -> None:
        """End the thread and drop the client; waits for nothing but an idle thread's end."""
        thread = self._thread
        self.abandon()
        if thread is not None:
            thread.join(timeout=_END_S)

    def __del__(self) -> None:
        self.abandon()


def _work(make_client: Callable[[], _C], jobs: SimpleQueue[_Job[_C, Any] | None]) -> None:
    made: list[_C] = []

    def client() -> _C:
        if not made:
            made.append(make_client())
        return made[0]

    while (job := jobs.get()) is not None:
        job.run(client)
        del job  # or its result would live until the next call


class Mailbox:
    """The keys below one prefix. Each key has one writer, which is also the one that deletes it.

    A key is deleted when it is certain that all its readers have read it; the owner of the mailbox knows and says
    so (`forget`). A reader therefore never meets a key that vanishes between `wait` and `get` (which would block).
    Errors: `SilentError`, and `RuntimeError` from the store; after either the client is not used again until `renew`.
    """

    def __init__(self, make_client: Callable[[], Store], prefix: str, *, name: str) -> None:
        self._watchdog: Watchdog[Store] = Watchdog(make_client, name=name)
        self.prefix = prefix
        self._written: list[tuple[int, str]] = []
        self._doomed: list[str] = []
        self.stage = 0
        """Counts the owner's operations; each key written is remembered with the stage of its writing."""

    def key(self, *parts: object) -> str:
        return "/".join([self.prefix, *map(str, parts)])

    def own(self, key: str) -> None:
        """Have a key that was written by other means deleted with those written now."""
        self._written.append((self.stage, key))

    def put(self, key: str, value: Json, *, timeout_s: float) -> None:
        """Write a key, and know that it is there: a TCPStore's `set` returns as if all were well on a dead line."""
        text, doomed = pack(value), self._doomed
        self._doomed = []
        self.own(key)

        def act(store: Store) -> None:
            for old in doomed:
                store.delete_key(old)
            store.set(key, text)
            if not store.check([key]):
                raise RuntimeError(f"the store lost the key {key!r}")

        self.run(act, timeout_s=timeout_s)

    def collect(self, keys: Mapping[int, str], *, timeout_s: float, ended: Ended = nobody) -> dict[int, Any]:
        """Wait for all keys; give the values of those that are there when all are, or at the timeout.

        `ended` gives the ranks that have ended: when one of those has left no value, that is the end of the waiting.
        """
        end, passed = time.monotonic() + timeout_s, set[int]()

        def in_vain() -> AbstractSet[int]:
            return ended() & keys.keys() - passed

        while keys:
            left_s = max(end - time.monotonic(), 0.0)
            wait = partial(collected, keys=keys, timeout_s=left_s)
            try:
                return self.run(wait, timeout_s=left_s, ended=in_vain)
            except VainError as error:
                there = self.run(partial(collected, keys=keys, timeout_s=LAST_S), timeout_s=LAST_S)
                if not error.ranks <= there.keys():
                    return there
                passed |= error.ranks  # they have said what they had to say
        return {}

    def peek(self, key: str, *, timeout_s: float) -> Any | None:
        """The value of a key that is deleted by nobody else now, or None if it is not there. Does not wait."""
        return self.run(lambda store: decode(store.get(key)) if store.check([key]) else None, timeout_s=timeout_s)

    def delete(self, key: str, *, timeout_s: float) -> None:
        """Delete a key of one's own that all its readers have read."""
        self.run(lambda store: store.delete_key(key), timeout_s=timeout_s)

    def forget(self, *, before: int) -> None:
        """All that was written before that stage has been read by all; it is deleted with the next `put`."""
        self._doomed += [key for stage, key in self._written if stage < before]
        self._written = [entry for entry in self._written if entry[0] >= before]

    def run(self, act: Callable[[Store], _T], *, timeout_s: float, ended: Ended = nobody) -> _T:
        try:
            return self._watchdog.call(act, within_s=timeout_s + _SLACK_S, ended=ended)
        except RuntimeError:
            self._watchdog.abandon()
            raise

    def renew(self) -> None:
        self._watchdog.renew()

    def close(self) -> None:
        self._watchdog.close()


@dataclass(frozen=True, slots=True)
class Line:
    """What another thread needs to speak with other ranks past the conversations of a gang: a store, and a prefix."""

    make_store: Callable[[], Store]
    """Gives a client for one thread."""
    prefix: str
    """The same on all ranks, and used by nobody else."""

    def key(self, *parts: object) -> str:
        return "/".join([self.prefix, *map(str, parts)])


def collected(store: Store, keys: Mapping[int, str], timeout_s: float) -> dict[int, Any]:
    missing = _wait(store, list(keys.values()), timeout_s)
    there = {rank: key for rank, key in keys.items() if key not in missing}
    return dict(zip(there, map(decode, _read(store, list(there.values()))), strict=True))


def there(store: Store, keys: Sequence[str]) -> dict[str, Any]:
    """The values of those of the keys that are there now. One that is deleted meanwhile is not, or reads as nothing."""
    missing = _missing(store, list(keys)) if keys else set[str]()
    found = [key for key in keys if key not in missing]
    texts = store.multi_get(found) if found and store.has_extended_api() else _read(store, found)
    return {key: decode(text) for key, text in zip(found, texts, strict=True) if text}


def waited(store: Store, *, key: str, timeout_s: float) -> bool:
    """Wait for it; False if it is not there at the timeout."""
    return not _wait(store, [key], timeout_s)


def _wait(store: Store, keys: list[str], timeout_s: float) -> set[str]:
    """The keys that are missing when all are there (then none), or at the timeout."""
    began = time.monotonic()
    try:
        # A timeout of zero means "for ever" to torch, and so does one below a millisecond.
        store.wait(keys, timedelta(seconds=max(timeout_s, 0.01)))
        return set()
    except RuntimeError as error:
        early = time.monotonic() - began < 0.9 * timeout_s
        try:
            missing = _missing(store, keys)
        except RuntimeError:
            raise error from None  # the first error says more about a store that is gone
        if missing and early:
            raise
        return missing


def _missing(store: Store, keys: list[str]) -> set[str]:
    """Those of the keys that are not there, by bisection: `check` only tells whether all are."""
    if store.check(keys):
        return set()
    if len(keys) == 1:
        return set(keys)
    half = len(keys) // 2
    return _missing(store, keys[:half]) | _missing(store, keys[half:])


def _read(store: Store, keys: Sequence[str]) -> list[bytes]:
    if len(keys) > 1 and store.has_extended_api():
        return store.multi_get(list(keys))
    return [store.get(key) for key in keys]
