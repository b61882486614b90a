"""Writing a file of scattered parts: a few large positioned writes on several threads, by one of three methods."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, TypeAlias

from shardckpt.storage.base import Buffer
from shardckpt.storage.posix.explain import explained
from shardckpt.storage.posix.syscalls import allocate
from shardckpt.storage.transfer.ranges import as_bytes
from shardckpt.storage.transfer.several import for_each

MiB = 1 << 20
PAGE = mmap.PAGESIZE
STREAMED = 2 * MiB
"""Bytes of a piece of parts that are made as they are written: up to nine pieces are kept at a time."""
MOST_BUFFERS = os.sysconf("SC_IOV_MAX") if hasattr(os, "sysconf") else 16
RWF_DONTCACHE = 0x80  # linux/fs.h, kernel 6.14; `os` names it from Python 3.15 on
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)

MethodName: TypeAlias = Literal["buffered", "direct", "dontcache"]


@dataclass(frozen=True, slots=True)
class WriteMethod:
    """How bytes go from memory to the device: by which way, on how many threads, in pieces of how many bytes."""

    way: MethodName
    threads: int
    piece_nbytes: int

    def __post_init__(self) -> None:
        if self.threads < 1 or self.piece_nbytes < PAGE or self.piece_nbytes % PAGE:
            raise ValueError(f"{self} needs at least one thread and pieces of whole pages ({PAGE} bytes)")


# `LocalStorage.put` of 1 GiB of random bytes in page-aligned memory (fallocate, write, fsync of file and folder), GB/s,
# medians of 5 alternating rounds with range; ext4 on a virtual disk, 2 cores, kernel 6.18, otherwise idle:
#
#   direct     4 threads, 16 MiB   2.96 (2.51-3.57)   2 threads 3.48 (2.81-3.53)
#   dontcache  2 threads,  8 MiB   2.97 (2.57-3.68)   1 thread  3.01 (2.65-3.59)
#   buffered   2 threads,  8 MiB   1.62 (0.67-2.10)   1 thread  1.13 (0.97-1.23)
#
# In a second run direct gave 3.20 to 3.47 with any of 1, 2, 4 threads x 8, 16, 32 MiB, dontcache 2.91, buffered 0.73.
# So direct is the default: as fast as anything here, it leaves the processor and the page cache to the training (the
# others copy every byte once), and what it cannot take (memory off a page, a file system without it) goes the way of
# "dontcache" by itself. Which is fastest depends on machine and load: `choose` finds out.
METHODS: dict[MethodName, WriteMethod] = {
    "buffered": WriteMethod("buffered", threads=2, piece_nbytes=8 * MiB),
    "direct": WriteMethod("direct", threads=4, piece_nbytes=16 * MiB),
    "dontcache": WriteMethod("dontcache", threads=2, piece_nbytes=8 * MiB),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """One positioned write: these buffers, one after the other, from this byte of the file on."""

    offset: int
    buffers: list[memoryview]


def pieces(parts: Iterable[Buffer], *, piece_nbytes: int, offset: int = 0) -> Iterator[Piece]:
    """Cut large parts and gather small ones, so that pieces begin at multiples of `piece_nbytes` from `offset` on.

    (Except after a piece that had to end early because a system call takes only so many buffers.)
    """
    start, room = offset, piece_nbytes
    gathered: list[memoryview] = []
    for part in parts:
        view = as_bytes(part)
        while len(view):
            take = view[:room]
            gathered.append(take)
            room -= len(take)
            view = view[len(take) :]
            if room == 0 or len(gathered) == MOST_BUFFERS:
                yield Piece(start, gathered)
                start += sum(map(len, gathered))
                gathered, room = [], room or piece_nbytes
    if gathered:
        yield Piece(start, gathered)


def write_parts(
    file: int,
    parts: Iterable[Buffer],
    *,
    method: WriteMethod,
    reopen: Callable[[int], int],
    what: str,
    offset: int = 0,
) -> int:
    """Write the parts into the file, from byte `offset` on, and fsync it; give the number of bytes.

    `reopen(flags)` opens the same file again with more flags (for O_DIRECT). What `parts` raises goes through as it is;
    failures of the system become `OSError`s that begin with `what` and say what to do.
    """
    piece_nbytes = min(method.piece_nbytes, STREAMED)
    if isinstance(parts, Sequence):  # they are there already; others take memory while they are on their way
        piece_nbytes = method.piece_nbytes
        with explained(what):
            allocate(file, sum(memoryview(part).nbytes for part in parts), offset=offset)
    nbytes = 0

    def counted(items: Iterator[Piece]) -> Iterator[Piece]:
        nonlocal nbytes
        for piece in items:
            nbytes += sum(map(len, piece.buffers))
            yield piece

    with ExitStack() as stack:
        writer = _writer(file, method, reopen, stack, what)

        def write(piece: Piece) -> None:
            with explained(what):
                writer(piece)

        for_each(counted(pieces(parts, piece_nbytes=piece_nbytes, offset=offset)), write, threads=method.threads)
    with explained(what):
        # Once, on the descriptor that was open during the writes. A failed fsync is not tried again: the kernel may
        # have marked the lost pages clean, and the second would succeed. The caller removes the file.
        os.fsync(file)
    return nbytes


def _writer(
    file: int, method: WriteMethod, reopen: Callable[[int], int], stack: ExitStack, what: str
) -> Callable[[Piece], None]:
    if method.way == "dontcache":
        return _Buffered(file, RWF_DONTCACHE).write
    o_direct = getattr(os, "O_DIRECT", 0)  # Linux only
    if method.way == "direct" and o_direct:
        try:
            direct = reopen(o_direct)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        else:
            stack.callback(_close, direct, what)
            return _Direct(direct, _Buffered(file, RWF_DONTCACHE)).write
    return _Buffered(file).write


def _close(file: int, what: str) -> None:
    with explained(what):
        os.close(file)


class _Buffered:
    """Through the page cache; with RWF_DONTCACHE the pages leave it as soon as they are written."""

    def __init__(self, file: int, flags: int = 0) -> None:
        self._file = file
        self._flags = flags

    def write(self, piece: Piece) -> None:
        offset, buffers = piece.offset, piece.buffers
        while buffers:
            flags = self._flags  # once: another thread may be refused, and clear them, during our call
            try:
                done = _pwritev(self._file, buffers, offset, flags)
            except OSError as error:
                if not flags or error.errno not in _UNSUPPORTED:
                    raise
                self._flags = 0  # kernel or file system does not know it
                continue
            if done == 0:
                raise OSError(errno.EIO, "the file system took no bytes and gave no reason")
            offset, buffers = offset + done, skipped(buffers, done)


def _pwritev(file: int, buffers: list[memoryview], offset: int, flags: int) -> int:
    # Flags are an argument only where there are any: macOS has pwritev without them.
    return os.pwritev(file, buffers, offset, flags) if flags else os.pwritev(file, buffers, offset)


class _Direct:
    """Past the page cache (O_DIRECT) as far as memory and offset lie on page boundaries; the rest as "dontcache" does.

    The two never touch the same page: the direct part of a piece ends on a page boundary.
    """

    def __init__(self, file: int, buffered: _Buffered) -> None:
        self._file = file
        self._buffered = buffered
        self._works = True

    def write(self, piece: Piece) -> None:
        offset, (aligned, rest) = piece.offset, split_aligned(piece)
        while aligned and self._works and offset % PAGE == 0:
            try:
                done = os.pwritev(self._file, aligned, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._works = False  # opened, but wants larger blocks than pages, or cannot do it after all
                break
            if done == 0:
                break
            offset, aligned = offset + done, skipped(aligned, done)
        if aligned or rest:
            self._buffered.write(Piece(offset, aligned + rest))


def split_aligned(piece: Piece) -> tuple[list[memoryview], list[memoryview]]:
    """The leading buffers whose address, length and place in the file are whole pages, and the rest."""
    if piece.offset % PAGE:
        return [], piece.buffers
    for index, buffer in enumerate(piece.buffers):
        whole = len(buffer) - len(buffer) % PAGE if _on_page(buffer) else 0
        if whole < len(buffer):
            head = [buffer[:whole]] if whole else []
            return piece.buffers[:index] + head, [buffer[whole:], *piece.buffers[index + 1 :]]
    return piece.buffers, []


def _on_page(buffer: memoryview) -> bool:
    # Python tells the address of writable memory only. Staging buffers are writable; `bytes` begin off a page anyway.
    return not buffer.readonly and ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE == 0


def skipped(buffers: list[memoryview], nbytes: int) -> list[memoryview]:
    """What remains of the buffers after `nbytes` of them were transferred."""
    for index, buffer in enumerate(buffers):
        if nbytes < len(buffer):
            return [buffer[nbytes:], *buffers[index + 1 :]]
        nbytes -= len(buffer)
    return []
