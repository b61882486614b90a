"""Page-aligned memory that is used again as soon as nobody looks at it any more."""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import numpy.typing as npt

from shardckpt.engine.consolidated.fragments import WINDOW


class Windows:
    """Pieces of memory of `WINDOW` bytes for a writer that says only at its end that it is done with them.

    A writer keeps the pieces that are still on their way, and drops them one by one. The array that is handed out is
    what all views of the memory hold on to; with the last of them it dies, and its memory is free for another. There
    are never more windows than the writer holds at a time, and memory is touched for the first time only once (which
    costs ten times a copy, see `saving.image`). Taken on one thread, dropped on any.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def take(self) -> npt.NDArray[np.uint8]:
        """Memory with any content. Keep views of it only through `array.data` or `torch.from_numpy(array)`: a slice
        made by numpy would hold the memory, but not the array."""
        memory = self._free.pop() if self._free else mmap.mmap(-1, WINDOW)
        array = np.frombuffer(memory, dtype=np.uint8)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array
