"""A kernel that fails on demand: takes the place of `os`, of libc and of `mmap` in the modules that touch a disk."""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from shardckpt.storage import local
from shardckpt.storage.posix import folders, map, read, syscalls, write

MAKING = ("create", "mkdir", "rename", "renameat2")
WRITING = ("pwritev", "fallocate64")
REMOVING = ("unlink", "rmdir")
LOOKING = ("open", "scandir", "stat", "fstat", "preadv", "readall", "mmap", "madvise")
SYNCING = ("fsync", "close")
ALL = (*MAKING, *WRITING, *REMOVING, *LOOKING, *SYNCING)


@dataclass(frozen=True)
class Fault:
    """What goes wrong at the n-th of these calls, once or from then on."""

    code: int
    calls: tuple[str, ...] = ALL
    lasting: bool = False
    short: bool = False
    """Half of the bytes are taken, or given, without an error."""


class System:
    """Counts calls, and fails the one that is due, and perhaps those after it. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = 0
        self._choice = 0
        self._lasting: Fault | None = None
        self.struck: Fault | None = None
        self.call_struck = ""
        self.choices = 0
        """In how many ways that call could have failed."""

    @contextmanager
    def failing(self, nth: int, choice: int) -> Iterator[None]:
        """At the n-th call, in one of the ways that it can."""
        with self._lock:
            self._left, self._choice, self.struck = nth, choice, None
        try:
            yield
        finally:
            with self._lock:
                self._left, self._lasting = 0, None

    def due(self, name: str) -> Fault | None:
        with self._lock:
            if self._lasting is not None:
                return self._lasting if name in self._lasting.calls else None
            self._left -= 1
            if self._left != 0:
                return None
            ways = [fault for fault in FAULTS if name in fault.calls]
            self.choices, self.call_struck = len(ways), name
            self.struck = ways[self._choice % len(ways)]
            if self.struck.lasting:
                self._lasting = self.struck
            return self.struck

    def call(self, name: str, real: Callable[..., Any], *given: Any, **options: Any) -> Any:
        if name == "open" and given[1] & os.O_CREAT:
            name = "create"
        fault = self.due(name)
        if fault is None:
            return None if name == "fsync" else real(*given, **options)  # nobody cuts the power here
        if fault.short:
            return real(given[0], _half(given[1]), *given[2:], **options)
        if name == "close":
            real(*given, **options)  # Linux gives the descriptor back whatever it says
        raise OSError(fault.code, os.strerror(fault.code))


def _half(buffers: list[memoryview]) -> list[memoryview]:
    return [buffers[0][: (len(buffers[0]) + 1) // 2]]


class _Module:
    """A module some of whose functions can fail."""

    def __init__(self, real: Any, system: System, names: tuple[str, ...]) -> None:
        self._real, self._system, self._names = real, system, names

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        return partial(self._system.call, name, found) if name in self._names else found


class _Foreign:
    """A function of libc: it gives -1, and tells why by errno."""

    def __init__(self, real: Any, name: str, system: System) -> None:
        self._real, self._name, self._system = real, name, system
        self.argtypes: tuple[Any, ...] = ()

    def __call__(self, *given: Any) -> int:
        fault = self._system.due(self._name)
        if fault is not None:
            ctypes.set_errno(fault.code)
            return -1
        self._real.argtypes = self.argtypes or self._real.argtypes
        return int(self._real(*given))


class _Libc:
    def __init__(self, system: System) -> None:
        real = ctypes.CDLL(None, use_errno=True)
        real.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self.mincore = real.mincore
        for name in ("renameat2", "fallocate64", "madvise"):
            setattr(self, name, _Foreign(getattr(real, name), name, system))


def install(monkeypatch: pytest.MonkeyPatch) -> System:
    """Put one between the storage and the kernel of this machine, until the end of the test."""
    made = System()

    class Stream(io.FileIO):
        def readall(self) -> Any:
            return made.call("readall", super().readall)

    names = (*MAKING, *WRITING, *REMOVING, *LOOKING, *SYNCING)
    for module in (local, folders, map, read, syscalls, write):
        monkeypatch.setattr(module, "os", _Module(os, made, names))
    libc = _Libc(made)
    monkeypatch.setattr(syscalls, "_libc", lambda: libc)
    monkeypatch.setattr(map, "mmap", _Module(mmap, made, ("mmap",)))
    monkeypatch.setattr(local, "open", lambda file, mode, buffering: Stream(file, mode), raising=False)
    return made


FAULTS = (
    Fault(errno.EIO),
    Fault(errno.EIO, lasting=True),
    Fault(errno.ESTALE),
    Fault(errno.ENOSPC, (*MAKING, *WRITING, *SYNCING)),
    Fault(errno.ENOSPC, (*MAKING, *WRITING), lasting=True),
    Fault(errno.EDQUOT, (*MAKING, *WRITING, *SYNCING)),
    Fault(errno.EACCES, (*MAKING, *REMOVING, "open", "scandir", "stat"), lasting=True),
    Fault(errno.EROFS, (*MAKING, *WRITING, *REMOVING), lasting=True),
    Fault(0, ("pwritev", "preadv"), short=True),
    Fault(0, ("pwritev", "preadv"), short=True, lasting=True),
)
