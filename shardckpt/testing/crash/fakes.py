"""Small stand-ins through which a recorder sees what else would go past `os`."""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Callable
from typing import Any


class Libc:
    """As much of a C library as `syscalls` calls."""

    def __init__(self, rename: Callable[..., int], fallocate: Callable[..., int]) -> None:
        def renameat2(*arguments: Any) -> int:  # functions, as argument types are set on them
            return rename(*arguments)

        def fallocate64(*arguments: Any) -> int:
            return fallocate(*arguments)

        self.renameat2, self.fallocate64 = renameat2, fallocate64
        real = ctypes.CDLL(None, use_errno=True)  # what changes no file
        self.madvise, self.mincore = real.madvise, real.mincore


class RawStream(io.RawIOBase):
    """A descriptor that is written by `os.write`, which a recorder sees."""

    def __init__(self, file: int) -> None:
        self._file = file

    def fileno(self) -> int:
        return self._file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return os.write(self._file, data)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._file, offset, whence)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._file)
