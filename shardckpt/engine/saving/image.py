"""The host buffer that is the file: page-aligned, kept from save to save, never handed to a forked child."""

from __future__ import annotations

import mmap

import torch

from shardckpt.format.archive import PAGE

_HUGE = 2 << 20


class Image:
    """Anonymous memory that grows when it must and is otherwise reused. Used by one thread at a time.

    It is kept because the first touch of fresh memory costs ten times the copy (1.0 against 8.8 GB/s, measured
    2026-11). Huge pages are asked for where the system has them.
    """

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._bytes: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Bytes that are held."""
        return len(self._map) if self._map is not None else 0

    def reserve(self, nbytes: int) -> bool:
        """Have room for `nbytes`; True if that took new memory, whose content is zero."""
        if nbytes <= self.capacity:
            return False
        self.release()
        step = _HUGE if nbytes >= _HUGE else PAGE
        rounded = -(-nbytes // step) * step
        self._map = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a forked loader worker must not make us copy on write
            if hasattr(mmap, advice):
                self._map.madvise(getattr(mmap, advice))
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        return True

    @property
    def view(self) -> memoryview:
        """All of it, writable."""
        if self._map is None:
            raise RuntimeError("reserve() first")
        return memoryview(self._map)

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor over the bytes from `offset` (a multiple of 64) on."""
        if self._bytes is None:
            raise RuntimeError("reserve() first")
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self._bytes[offset : offset + nbytes].view(dtype).view(shape)

    def release(self) -> None:
        """Give the memory back as soon as nobody looks at it any more."""
        self._bytes = None
        self._map = None  # unmapped with the last view of it: closing it under a view would be an error
