"""Storages that fail, hang, tear, remember and count; each wraps a real one, and renames folders exactly if that does.

And two ways to damage files at rest. For tests, ours and those of others; safe to use from several threads.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from shardckpt.storage.base import Read, Storage
from shardckpt.storage.wrapping import Operation, StorageWrapper

T = TypeVar("T")
When = Callable[[Operation], bool]


def on(*names: str, key: str = "") -> When:
    """A predicate: the operation is one of these (any, if none is named) and one of its keys contains `key`."""

    def matches(operation: Operation) -> bool:
        return (not names or operation.name in names) and (not key or any(key in each for each in operation.keys))

    return matches


class FailingStorage(StorageWrapper):
    """Raises at the n-th operation that matches, and at the `times - 1` matching ones after it."""

    def __init__(
        self,
        inner: Storage,
        when: When | None = None,
        *,
        nth: int = 1,
        times: int | None = 1,
        error: Callable[[], BaseException] = lambda: ConnectionResetError("injected: the connection broke"),
        after: bool = False,
    ) -> None:
        """`times=None` fails for ever; `after` does the operation first and then raises: the answer is lost."""
        super().__init__(inner)
        self._when, self._error, self._after = when or on(), error, after
        self._first, self._last = nth, None if times is None else nth + times - 1
        self._lock = threading.Lock()
        self._matched = 0
        self._failed = 0

    @property
    def failed(self) -> int:
        """How many operations were made to fail."""
        with self._lock:
            return self._failed

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        if not (self._when(operation) and self._is_due()):
            return call()
        if self._after:
            call()
        raise self._error()

    def _is_due(self) -> bool:
        with self._lock:
            self._matched += 1
            due = self._matched >= self._first and (self._last is None or self._matched <= self._last)
            self._failed += due
            return due


class GatedStorage(StorageWrapper):
    """Operations that match wait until the gate is opened: a slow or a hanging place."""

    def __init__(self, inner: Storage, when: When | None = None, *, limit: timedelta = timedelta(seconds=60)) -> None:
        """`limit` ends the waiting with a `TimeoutError`, so that a test that forgot the gate ends, too."""
        super().__init__(inner)
        self._when = when or on()
        self._limit = limit
        self.gate = threading.Event()
        """Set it, or call `open_gate`, to let everything through from now on."""
        self.reached = threading.Event()
        """Set once an operation has come to the gate."""

    def open_gate(self) -> None:
        self.gate.set()

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        if self._when(operation):
            self.reached.set()
            if not self.gate.wait(self._limit.total_seconds()):
                raise TimeoutError(f"injected: nobody opened the gate for {operation} within {self._limit}")
        return call()


@dataclass(frozen=True, slots=True)
class Tear:
    """How the stored bytes of a key look when they are read: cut off after `keep` bytes, the byte at `flip` changed."""

    keep: int | None = None
    flip: int | None = None


class TornStorage(StorageWrapper):
    """Shows chosen keys damaged to its readers; what is stored stays whole."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self._tears: dict[str, Tear] = {}

    def tear(self, key: str, *, keep: int | None = None, flip: int | None = None) -> None:
        """From now on `key` ends after `keep` bytes, and its byte at offset `flip` is inverted."""
        self._tears[key] = Tear(keep, flip)

    def mend(self) -> None:
        """Show everything whole again."""
        self._tears.clear()

    def read(self, key: str) -> bytes:
        content = bytearray(super().read(key))
        tear = self._tears.get(key, Tear())
        _flip(tear, memoryview(content), 0)
        return bytes(content[: tear.keep])

    def read_into(self, reads: Sequence[Read]) -> None:
        for read in reads:
            tear = self._tears.get(read.key, Tear())
            if tear.keep is not None and read.offset + memoryview(read.into).nbytes > tear.keep:
                raise EOFError(f"injected: {read.key!r} in {self.url} ends at byte {tear.keep}, read at {read.offset}")
        super().read_into(reads)
        for read in reads:
            _flip(self._tears.get(read.key, Tear()), read.into, read.offset)

    def size(self, key: str) -> int:
        nbytes, keep = super().size(key), self._tears.get(key, Tear()).keep
        return nbytes if keep is None else min(nbytes, keep)


def _flip(tear: Tear, content: memoryview, offset: int) -> None:
    """Invert the torn byte if it lies in `content`, which begins at byte `offset` of its object."""
    if tear.flip is not None and offset <= tear.flip < offset + len(content):
        content[tear.flip - offset] ^= 0xFF


class RecordingStorage(StorageWrapper):
    """Remembers every operation in the order in which they began."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._operations: list[Operation] = []

    @property
    def operations(self) -> tuple[Operation, ...]:
        with self._lock:
            return tuple(self._operations)

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        with self._lock:
            self._operations.append(operation)
        return call()


class CountingStorage(StorageWrapper):
    """Counts, by key, the bytes that were read and the single reads that asked for them; failed ones do not count."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self.nbytes: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()

    @property
    def total_nbytes(self) -> int:
        with self._lock:
            return self.nbytes.total()

    def read(self, key: str) -> bytes:
        content = super().read(key)
        self._count(key, len(content))
        return content

    def read_into(self, reads: Sequence[Read]) -> None:
        super().read_into(reads)
        for read in reads:
            self._count(read.key, memoryview(read.into).nbytes)

    def _count(self, key: str, nbytes: int) -> None:
        with self._lock:
            self.nbytes[key] += nbytes
            self.requests[key] += 1


def flip_byte(path: str | os.PathLike[str], offset: int) -> None:
    """Invert one byte of a file at rest; a negative offset counts from the end."""
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        value = file.read(1)
        if not value:
            raise ValueError(f"{os.fspath(path)!r} has no byte at {offset}")
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value[0] ^ 0xFF]))


def truncate(path: str | os.PathLike[str], nbytes: int) -> None:
    """Cut a file at rest off after `nbytes` bytes. `ValueError` if it is not longer than that."""
    if os.path.getsize(path) <= nbytes:
        raise ValueError(f"{os.fspath(path)!r} has no more than {nbytes} bytes: nothing would be cut off")
    os.truncate(path, nbytes)
