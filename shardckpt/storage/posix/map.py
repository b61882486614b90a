"""Lending a file: its bytes are looked at where the page cache has them, without memory of one's own for them.

A look at a mapped page that cannot be had is no error but a signal (SIGBUS), which ends the process. `bring` therefore
has the kernel map the pages first (MADV_POPULATE_READ, Linux 5.14), which *returns* what would have been signalled:
a fault of the device, a file server that has forgotten the file, a file that has become shorter. What remains is a file
that somebody cuts off in place in the very moment in which its bytes are looked at. Nothing here does that: files are
written once, and replaced and deleted by rename and unlink, which a mapping outlives.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence

from shardckpt.storage.posix.explain import explain, explained
from shardckpt.storage.posix.folders import let_go
from shardckpt.storage.posix.syscalls import POPULATE_READ, advise, in_memory
from shardckpt.storage.posix.write import skipped

_WINDOW_NBYTES = 1 << 20
_LOOKS = 3
"""Parts of a stretch at whose ends it is looked whether the page cache has them. Of every page it took 12 ms/GB, where
all else of a check took 55 (2026-11-27, processor time)."""


class MappedFile:
    """A regular file, mapped whole for reading; the `Lent` of a local file system. Any thread may call.

    Nothing of it may be used after `close`, and no view of it kept.
    """

    def __init__(self, file: int, what: str) -> None:
        """Takes over the descriptor; errors begin with `what`."""
        self._file = file
        self._what = what
        self._populates = True
        self._is_ready = True
        try:
            with explained(what):
                self._nbytes = os.fstat(file).st_size
                self._map = mmap.mmap(file, self._nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ) if self._nbytes else None
        except BaseException:
            let_go(file)
            raise
        self._address = _address_of(self._map) if self._map is not None else 0

    @property
    def view(self) -> memoryview:
        return memoryview(self._map) if self._map is not None else memoryview(b"")

    @property
    def address(self) -> int:
        return self._address

    def state(self) -> tuple[int, ...]:
        with explained(self._what):
            now = os.fstat(self._file)
        # Not the time of the last change of the inode: a hard link made by a backup changes that, and no byte.
        return (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)

    def is_here(self, start: int, nbytes: int) -> bool:
        if not nbytes or start + nbytes > self._nbytes:
            return False
        last = start + nbytes - 1
        looks = sorted({start + (last - start) * part // _LOOKS for part in range(_LOOKS + 1)})
        return all(in_memory(self._address + at) for at in looks)

    def bring(self, start: int, nbytes: int) -> None:
        if start + nbytes > self._nbytes:
            raise self._ended_early(start, nbytes)
        if not nbytes:
            return
        if self._populates:
            code = advise(self._address + start, nbytes, POPULATE_READ)
            if code == 0:
                return
            self._populates = code != errno.EINVAL  # an older kernel, or another system
        self._read_through(start, nbytes)  # says why it was refused
        if self._populates:
            raise explain(OSError(errno.EIO, os.strerror(errno.EIO)), self._what)

    def take(self, start: int, into: Sequence[memoryview], *, wait: bool) -> bool:
        nbytes = sum(len(buffer) for buffer in into)
        if not wait:
            return self._now(start, into) == nbytes
        left, at = list(into), start
        while left:
            with explained(self._what):
                done = os.preadv(self._file, left, at)
            if done == 0:
                raise self._ended_early(start, nbytes)
            left, at = skipped(left, done), at + done
        return True

    def forget(self, start: int, nbytes: int) -> None:
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:  # pages that are shared with neighbours stay
            advise(self._address + first, last - first, mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmapped with the last view of it: closing it under a view would be an error."""
        self._map = None
        if self._file >= 0:
            let_go(self._file)
            self._file = -1

    def _now(self, start: int, into: Sequence[memoryview]) -> int:
        """How many bytes came without waiting. Where the system or the file system has no such reads, always none."""
        flag = getattr(os, "RWF_NOWAIT", 0)  # Linux 4.14
        if not (flag and self._is_ready):
            return 0
        try:
            return os.preadv(self._file, into, start, flag)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise explain(error, self._what) from error
            self._is_ready = False
            return 0

    def _read_through(self, start: int, nbytes: int) -> None:
        """The same by plain reads: they fill the page cache too, and fail with an error."""
        window, end = memoryview(bytearray(min(nbytes, _WINDOW_NBYTES))), start + nbytes
        for at in range(start, end, len(window)):
            wanted = window[: min(len(window), end - at)]
            with explained(self._what):
                done = os.preadv(self._file, [wanted], at)
            if done < len(wanted):
                raise self._ended_early(start, nbytes)

    def _ended_early(self, start: int, nbytes: int) -> EOFError:
        return EOFError(
            f"{self._what}: it ends too early: bytes {start} to {start + nbytes} were asked for; the file is "
            "truncated, so load another step or restore it from a copy"
        )


class _Buffer(ctypes.Structure):
    """Py_buffer, of which only the first field is of interest."""

    _fields_ = (("address", ctypes.c_void_p), ("rest", ctypes.c_void_p * 10))


def _address_of(memory: mmap.mmap) -> int:
    """By the buffer protocol itself: ctypes tells that of writable memory only, and numpy takes 0.1 s to load."""
    buffer, api = _Buffer(), ctypes.pythonapi
    api.PyObject_GetBuffer(ctypes.py_object(memory), ctypes.byref(buffer), 0)  # PyBUF_SIMPLE; raises if it cannot
    api.PyBuffer_Release(ctypes.byref(buffer))
    return int(buffer.address or 0)
