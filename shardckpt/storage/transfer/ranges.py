"""Ranged reads as few requests: neighbours are merged, long runs are cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shardckpt.storage.base import Buffer, Read


@dataclass(frozen=True, slots=True)
class Run:
    """One request: the bytes of `key` from `offset`, which go into `into` one buffer after the other."""

    key: str
    offset: int
    into: tuple[memoryview, ...]

    @property
    def nbytes(self) -> int:
        return sum(len(buffer) for buffer in self.into)

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def fill(self, answer: bytes, *, url: str) -> None:
        """Put the bytes in their places. `EOFError` if there are not enough."""
        if len(answer) < self.nbytes:
            raise self.ended_early(url, have=len(answer))
        source, start = memoryview(answer), 0
        for buffer in self.into:
            buffer[:] = source[start : start + len(buffer)]
            start += len(buffer)

    def ended_early(self, url: str, *, have: int) -> EOFError:
        """The error for an object that gave only `have` bytes of this run."""
        return EOFError(
            f"{self.key!r} in {url} ends too early: bytes {self.offset} to {self.end} were asked for, and it ended at "
            f"byte {self.offset + have}; the object is truncated, so load another step or restore it from a copy"
        )


def merge(reads: Iterable[Read], *, run_nbytes: int, run_buffers: int) -> list[Run]:
    """Sort the reads by key and offset, join those that are exactly adjacent, cut what is longer than `run_nbytes`.

    Reads of no bytes are dropped: they ask for nothing. Reads that overlap stay runs of their own.
    """
    runs: list[Run] = []
    key, offset, into, room = "", 0, list[memoryview](), 0

    def finish() -> None:
        if into:
            runs.append(Run(key, offset, tuple(into)))

    end = -1
    for read in sorted(reads, key=lambda read: (read.key, read.offset)):
        view, start = as_bytes(read.into), read.offset
        while len(view):
            if not (into and read.key == key and start == end and room and len(into) < run_buffers):
                finish()
                key, offset, into, room = read.key, start, [], run_nbytes
            take = view[:room]
            into.append(take)
            room -= len(take)
            view, start = view[len(take) :], start + len(take)
            end = start
    finish()
    return runs


def as_bytes(buffer: Buffer) -> memoryview:
    """A flat view of single bytes, whatever the item type of the buffer was."""
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")
