"""The host buffer that is the file: page-aligned, kept from save to save, never forked; and the copies into it."""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch

from shardckpt.engine.saving.devices.seam import Devices, Mark, Place
from shardckpt.engine.saving.share import Share
from shardckpt.engine.writing.shared import SharedMap
from shardckpt.format.archive import PAGE

_log = logging.getLogger(__name__)

_HUGE = 2 << 20
_SLICE = 32 << 20
"""Bytes copied in one call: small enough to share a large tensor between threads, large enough not to show."""


class Image:
    """Memory without a name that grows when it must and is otherwise reused. Used by one thread at a time.

    It is kept because the first touch of fresh memory costs ten times the copy (1.0 against 8.8 GB/s, measured
    2026-11). Huge pages are asked for where the system has them.
    """

    def __init__(self, *, shared: bool = False, huge: bool = True) -> None:
        """`shared`: the process that writes maps it as well. `huge`: whether to ask for huge pages."""
        self._shared = shared
        self._advice = ("MADV_HUGEPAGE", "MADV_DONTFORK") if huge else ("MADV_DONTFORK",)
        self._map: mmap.mmap | None = None
        self._bytes: torch.Tensor | None = None
        self._unlock: weakref.finalize[[Callable[[], None], list[Mark]], Image] | None = None
        self._awaited: list[Mark] = []
        self._refused = 0

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
        if self._shared:
            self._map = SharedMap(rounded)
        else:
            self._map = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in self._advice:  # a forked loader worker must not make us copy on write
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

    @property
    def is_locked(self) -> bool:
        """Whether copies from devices can be queued; else whoever makes one waits for it."""
        return self._unlock is not None

    def lock(self, devices: Devices, place: Place) -> None:
        """Page-lock it where it is, once for as long as it is kept; nobody copies to it meanwhile.

        Where that cannot be done it is said once, and saves go on without.
        """
        if self._map is None or self._unlock is not None or self.capacity == self._refused:
            return
        try:
            unlock = devices.lock(self._map, place)
        except OSError as error:
            _warn_of(error, self.capacity, first=not self._refused)
            self._refused = self.capacity
            return
        # Also where nobody calls `release`. What undoes the lock refers to the map, which is so not unmapped before.
        self._unlock = weakref.finalize(self, _unlock, unlock, self._awaited)
        self._unlock.atexit = False  # the process ends, and its memory with it

    def expect(self, mark: Mark) -> None:
        """Copies into it are under way until that mark."""
        self._awaited[:] = [*self._awaited[-_MARKS:], mark]

    def release(self) -> None:
        """Give the memory back as soon as nobody looks at it any more."""
        if self._unlock is not None:
            self._unlock()
        self._unlock, self._awaited = None, []
        self._bytes = None
        self._map = None  # unmapped with the last view of it: closing it under a view would be an error


_MARKS = 63
"""That are remembered of an image: more than one save has, and marks of earlier saves have been waited for."""


def _unlock(unlock: Callable[[], None], awaited: list[Mark]) -> None:
    """A device that still copied to memory that is no longer locked would write to whatever comes there."""
    try:
        for mark in awaited:
            mark.wait()
        unlock()
    except Exception as error:  # of CUDA itself, which other calls will report as well
        _log.warning("page-locked memory could not be unlocked: %s", error)


def _warn_of(error: OSError, nbytes: int, *, first: bool) -> None:
    _log.log(
        logging.WARNING if first else logging.DEBUG,
        "%.2f GB of host memory for checkpoints are not page-locked: %s. Saves are right all the same, but copies from "
        "the GPU then take about three times as long, and the next optimizer step waits for them on the host. Give the "
        "job more memory, or shard the state over more ranks",
        nbytes / 1e9,
        error.strerror or error,
    )


def slices(target: torch.Tensor, source: torch.Tensor, at: int, share: Share) -> Iterable[Callable[[], None]]:
    """Copies of what lies in the share, of a tensor whose first byte is byte `at` of the file."""
    itemsize = target.element_size()
    first, last = max(0, share.start - at), min(target.numel() * itemsize, share.end - at)
    if source.is_contiguous() and (last - first > _SLICE or last - first < target.numel() * itemsize):
        flat_target, flat_source = target.view(-1), source.view(-1)
        for start in range(first // itemsize, -(-last // itemsize), _SLICE // itemsize):
            end = min(start + _SLICE // itemsize, -(-last // itemsize))
            yield _copy_job(flat_target[start:end], flat_source[start:end])
    else:
        yield _copy_job(target, source)


def _copy_job(target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
    def copy() -> None:
        raw(target).copy_(raw(source))

    return copy


def copy_small(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Many tensors in one call: 20,000 small ones, or some of medium size. Targets have the dtypes of their sources."""
    if any(map(_has_no_copy, {target.dtype for target in targets})):
        targets, sources = [raw(target) for target in targets], [raw(source) for source in sources]
    with torch.no_grad():
        torch._foreach_copy_(targets, sources)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or its bytes where torch has no copy for its dtype (bits8, float4, ...)."""
    return tensor.contiguous().view(torch.uint8) if _has_no_copy(tensor.dtype) else tensor


@lru_cache(maxsize=64)
def _has_no_copy(dtype: torch.dtype) -> bool:
    return "bits" in str(dtype) or "float4" in str(dtype)
