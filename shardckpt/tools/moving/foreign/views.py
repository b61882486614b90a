"""Row-major bytes of tensors that lie in their storages in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardckpt.engine.consolidated.blocks import Block, stretch
from shardckpt.format.index import ITEMSIZE
from shardckpt.format.restricted.foreign import StoredView

Load: TypeAlias = Callable[[int, int], memoryview]
"""Gives bytes of a storage: from which one on, and how many."""

_Array: TypeAlias = npt.NDArray[Any]

_WORDS: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("u2"),
    4: np.dtype("u4"),
    8: np.dtype("u8"),
    16: np.dtype("c16"),
}


class Gatherer:
    """Brings elements together that do not lie side by side, with a bounded stretch of a storage in memory at once.

    What lies between them is read as well. A storage that is no larger than the bound is kept until another is wanted:
    the next window of the same tensor then needs no read. Any thread may call, one is served at a time.
    """

    def __init__(self, most_nbytes: int) -> None:
        self._most = most_nbytes
        self._lock = threading.Lock()
        self._kept: tuple[Any, memoryview] | None = None

    def fill(self, what: Any, view: StoredView, load: Load, *, start: int, into: memoryview) -> None:
        """Bytes `start` on of the tensor as it lies row by row. `what` names its storage, across all files."""
        itemsize = ITEMSIZE[view.dtype]
        first, last = start // itemsize, -(-(start + len(into)) // itemsize)
        with self._lock:
            if view.storage_nbytes <= self._most:
                load = self._from_memory(what, view, load)
            straight = last - first == len(into) // itemsize and len(into) % itemsize == 0
            found: _Array = (
                np.frombuffer(into, _WORDS[itemsize]) if straight else np.empty(last - first, _WORDS[itemsize])
            )
            done = 0
            for block in stretch(view.shape, first, last):
                place = found[done : done + block.numel].reshape(block.lengths)
                self._gather(view, load, block, place)
                done += block.numel
        if not straight:
            skipped = start - first * itemsize
            into[:] = memoryview(found.view(np.uint8).data)[skipped : skipped + len(into)]

    def _from_memory(self, what: Any, view: StoredView, load: Load) -> Load:
        if self._kept is None or self._kept[0] != what:
            self._kept = None
            self._kept = (what, load(0, view.storage_nbytes))
        kept = self._kept[1]
        return lambda at, nbytes: kept[at : at + nbytes]

    def _gather(self, view: StoredView, load: Load, block: Block, into: _Array) -> None:
        """A block of the tensor; where its stretch of the storage is too long, by halves."""
        itemsize = into.dtype.itemsize
        reach = [(length - 1) * step for length, step in zip(block.lengths, view.stride, strict=True)]
        nbytes = (sum(reach) + 1) * itemsize
        longest = max(range(len(reach)), key=reach.__getitem__, default=0)
        if nbytes > self._most and max(reach, default=0):
            half = block.lengths[longest] // 2
            for at, length in ((0, half), (half, block.lengths[longest] - half)):
                part = _part(block, longest, at, length)
                self._gather(view, load, part, into[part.inside(block).slices])
            return
        begin = view.offset + sum(at * step for at, step in zip(block.offsets, view.stride, strict=True))
        content = np.frombuffer(load(begin * itemsize, nbytes), dtype=into.dtype)
        strides = tuple(step * itemsize for step in view.stride)
        into[...] = np.lib.stride_tricks.as_strided(content, block.lengths, strides, writeable=False)


def _part(block: Block, dim: int, at: int, length: int) -> Block:
    offsets, lengths = list(block.offsets), list(block.lengths)
    offsets[dim] += at
    lengths[dim] = length
    return Block(tuple(offsets), tuple(lengths))
