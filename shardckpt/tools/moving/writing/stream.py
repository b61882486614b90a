"""The content of a file as bytes and tensors of a source, one after the other, through windows of bounded size."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

from shardckpt.engine.consolidated.assembling.windows import Windows
from shardckpt.engine.consolidated.fragments import WINDOW
from shardckpt.tools.moving.seam import TensorSource, Window

LEAST_BUDGET = 4 * WINDOW
"""Bytes: no less is of use."""
_SHARE = 4
"""Of the budget, one share is being read, one is handed out, and what is left is on its way into the storage."""

Segment: TypeAlias = bytes | tuple[str, int]
"""What a file is made of, without gaps: bytes, or a tensor of the source (its name, and its bytes)."""


@dataclass(frozen=True, slots=True)
class FileContent:
    """A file before it is written."""

    name: str
    segments: Sequence[Segment]

    @property
    def nbytes(self) -> int:
        return sum(map(_nbytes_of, self.segments))

    @property
    def tensors(self) -> list[str]:
        return [segment[0] for segment in self.segments if not isinstance(segment, bytes)]


def cut(segments: Sequence[Segment], start: int, stop: int) -> Iterator[tuple[Segment, int, int]]:
    """What lies between two bytes of a file: each segment, and the first and last of its bytes that do."""
    at = 0
    for segment in segments:
        nbytes = _nbytes_of(segment)
        first, last = max(start - at, 0), min(stop - at, nbytes)
        if first < last:
            yield segment, first, last
        at += nbytes


def _nbytes_of(segment: Segment) -> int:
    return len(segment) if isinstance(segment, bytes) else segment[1]


@dataclass(slots=True)
class _Batch:
    """Pieces of the file, in order, and the reads that fill them."""

    pieces: list[memoryview] = field(default_factory=list)
    reads: list[Window] = field(default_factory=list)


def streamed(
    source: TensorSource,
    segments: Sequence[Segment],
    *,
    budget_nbytes: int,
    stretch: tuple[int, int] | None = None,
) -> Generator[memoryview, None, None]:
    """The segments, or the bytes of them from one to another, in pieces of memory of their own.

    The next pieces are read on a thread while the present ones are written. Close it, so that the thread ends. Where a
    tensor begins at a multiple of its element's size, no read cuts an element.
    """
    start, stop = stretch or (0, sum(map(_nbytes_of, segments)))
    coming = _batches(cut(segments, start, stop), max(budget_nbytes // _SHARE // WINDOW, 1))
    with ThreadPoolExecutor(1, thread_name_prefix="shardckpt-read") as pool:

        def begin() -> tuple[_Batch, Future[None]] | None:
            batch = next(coming, None)
            return (batch, pool.submit(source.read, batch.reads)) if batch is not None else None

        under_way = begin()
        while under_way is not None:
            batch, reading = under_way
            reading.result()
            del reading, under_way  # which would hold the memory of pieces that are written
            batch.reads.clear()
            under_way = begin()
            while batch.pieces:
                yield batch.pieces.pop(0)


def _batches(cuts: Iterator[tuple[Segment, int, int]], at_once: int) -> Iterator[_Batch]:
    """Windows of the file, so many at once."""
    pool, batch = Windows(), _Batch()
    view, used = pool.take().data, 0
    for segment, start, stop in cuts:
        while start < stop:
            count = min(stop - start, WINDOW - used)
            into = view[used : used + count]
            if isinstance(segment, bytes):
                into[:] = segment[start : start + count]
            else:
                batch.reads.append(Window(segment[0], start, into))
            start, used = start + count, used + count
            if used == WINDOW:
                batch.pieces.append(view)
                if len(batch.pieces) == at_once:
                    yield batch
                    batch = _Batch()
                view, used = pool.take().data, 0
    if used:
        batch.pieces.append(view[:used])
    if batch.pieces:
        yield batch
