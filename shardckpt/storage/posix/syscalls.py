"""Linux system calls that Python does not offer, or not without its lock. Each says when the place cannot do it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

POPULATE_READ, POPULATE_WRITE = 22, 23
"""linux/mman.h, Linux 5.14."""
NOREPLACE = 1
EXCHANGE = 2
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

Entry: TypeAlias = tuple[int, str]
"""A folder's descriptor and the name of an entry in it."""


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def renameat2(source: Entry, target: Entry, flags: int) -> bool:
    """Rename with flags; False, with nothing done, where kernel or file system (NFS, some FUSE) does not know them."""
    call = getattr(_libc(), "renameat2", None)  # glibc >= 2.28, musl >= 1.2.4
    if call is None:
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if call(source[0], os.fsencode(source[1]), target[0], os.fsencode(target[1]), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), source[1], None, target[1])


def rename_new(source: Entry, target: Entry, *, rename: Callable[[Entry, Entry, int], bool] = renameat2) -> None:
    """Rename a folder (the caller has made sure that it is one) to a free name: `FileExistsError` if it is not free.

    Where RENAME_NOREPLACE is not known, the name is looked at first. What can come between the look and the rename
    harms nobody: rename(2) of a folder replaces only an empty folder, never a file or a folder with something in it.
    """
    if rename(source, target, NOREPLACE):
        return
    try:
        os.stat(target[1], dir_fd=target[0], follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target[1])
    try:
        os.rename(source[1], target[1], src_dir_fd=source[0], dst_dir_fd=target[0])
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target[1]) from error
        raise


def allocate(file: int, nbytes: int, *, offset: int = 0) -> None:
    """Reserve the blocks of a file of known size: a full disk shows at once, and the file lies in one piece.

    Not `os.posix_fallocate`: where the file system cannot reserve (NFS before 4.2, some FUSE), glibc imitates it by
    writing to every block, which would write the file twice. Here nothing is done in that case.
    """
    call = getattr(_libc(), "fallocate64", None) or getattr(_libc(), "fallocate", None)
    if call is None or nbytes == 0:
        return
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while call(file, 0, offset, nbytes) != 0:
        code = ctypes.get_errno()
        if code in _CANNOT:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def advise(address: int, nbytes: int, advice: int) -> int:
    """madvise(2) of the pages in which these bytes lie: 0 or an errno.

    Not `mmap.madvise`, which does not let other threads run meanwhile.
    """
    call = _libc().madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    first = address - address % mmap.PAGESIZE
    return 0 if call(first, address + nbytes - first, advice) == 0 else ctypes.get_errno() or errno.EIO


def in_memory(address: int) -> bool:
    """mincore(2): whether the page of this byte is there. Linux says so of all files that are not to be written to."""
    call, found = _libc().mincore, ctypes.create_string_buffer(1)
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    return call(address - address % mmap.PAGESIZE, mmap.PAGESIZE, found) == 0 and bool(found.raw[0] & 1)
