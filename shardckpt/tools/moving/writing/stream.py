"""Tensors of a source one after the other as the content of a file, through windows of bounded size."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from shardckpt.engine.consolidated.assembling.windows import Windows
from shardckpt.engine.consolidated.fragments import WINDOW
from shardckpt.tools.moving.seam import TensorSource, Window

LEAST_BUDGET = 4 * WINDOW
"""Bytes: no less is of use."""
_SHARE = 4
"""Of the budget, one share is being read, one is handed out, and what is left is on its way into the storage."""


@dataclass(slots=True)
class _Batch:
    """Pieces of the file, in order, and the reads that fill them."""

    pieces: list[memoryview] = field(default_factory=list)
    reads: list[Window] = field(default_factory=list)


def streamed(
    source: TensorSource, head: bytes, tensors: Iterable[tuple[str, int]], *, budget_nbytes: int
) -> Generator[memoryview, None, None]:
    """The head, then these tensors (name, bytes) without gaps, in pieces of memory of their own.

    The next pieces are read on a thread while the present ones are written. Close it, so that the thread ends. Where a
    tensor begins at a multiple of its element's size, no read cuts an element.
    """
    coming = _batches(head, tensors, max(budget_nbytes // _SHARE // WINDOW, 1))
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


def _batches(head: bytes, tensors: Iterable[tuple[str, int]], at_once: int) -> Iterator[_Batch]:
    """Windows of the file, so many at once."""
    pool, batch = Windows(), _Batch()
    view, used = pool.take().data, 0
    stretches: Iterable[tuple[str | None, int]] = [(None, len(head)), *tensors]
    for name, nbytes in stretches:
        start = 0
        while start < nbytes:
            count = min(nbytes - start, WINDOW - used)
            into = view[used : used + count]
            if name is None:
                into[:] = head[start : start + count]
            else:
                batch.reads.append(Window(name, start, into))
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
