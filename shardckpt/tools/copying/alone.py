"""One copy at a time into a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from shardckpt.errors import CheckpointSaveError
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage

LOCK = "copying"
"""Name of a file in the folder of a copy under way. It is gone before the copy becomes a step."""


@contextmanager
def alone(storage: Storage, folder: str) -> Iterator[None]:
    """Be the only one that copies into this folder, which is there. `CheckpointSaveError` if another does already.

    On file systems, where a file that is being written can be seen: without this, a second copy would take the file of
    the first for one that a crash has cut off. Object stores show whole objects only; two that copy the same are no
    harm there.
    """
    if not isinstance(storage, LocalStorage):
        yield
        return
    file = _locked(storage.path_of(f"{folder}/{LOCK}"))
    try:
        yield
    finally:
        os.close(file)


def _locked(path: str) -> int:
    """The descriptor of the lock. The holder before may have removed or moved the file while this one waited to open
    it, so that what was locked is no longer what the next one finds: then again."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False)):
                    return file
        except BaseException as error:
            os.close(file)
            if isinstance(error, OSError) and error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise CheckpointSaveError(
                    f"another process is copying to {os.path.dirname(path)}; nothing was changed: let it finish"
                ) from error
            raise
        os.close(file)
