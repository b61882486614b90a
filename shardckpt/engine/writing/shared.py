"""Memory that another process can map as well: it has no name, and is gone with the last who maps it."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref


class SharedMap(mmap.mmap):
    """A mapping of a memfd (Linux); `file` is its descriptor, open as long as the mapping lives."""

    file: int

    def __new__(cls, nbytes: int) -> SharedMap:
        file = os.memfd_create("shardckpt-image", os.MFD_CLOEXEC)
        try:
            os.ftruncate(file, nbytes)
            self = super().__new__(cls, file, nbytes, flags=mmap.MAP_SHARED)
        except BaseException:
            os.close(file)
            raise
        self.file = file
        weakref.finalize(self, os.close, file)
        return self


def place_in(view: memoryview) -> tuple[SharedMap, int] | None:
    """The map that a view looks at, and where in it the view begins; None if it looks at other memory."""
    owner = view.obj
    if not isinstance(owner, SharedMap) or view.readonly or not view.nbytes:
        return None
    return owner, _address(view) - _address(memoryview(owner))


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
