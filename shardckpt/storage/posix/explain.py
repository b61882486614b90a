"""Operating system errors in words that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_ADVICE = {
    errno.ENOSPC: "the file system is full (or out of inodes): free space, for example by keeping fewer steps",
    errno.EDQUOT: "the disk quota is used up: free space or ask for a larger quota",
    errno.EROFS: "the file system is mounted read-only: choose another root, or remount it (the kernel also does "
    "this after a device fault: see dmesg)",
    errno.EACCES: "permission denied: check owner and mode of the root and of the folders above it",
    errno.EPERM: "not permitted: check owner, mode and attributes (immutable?) of the file and its folder",
    errno.EIO: "the device or the server reports a fault: see dmesg; what was being written is lost, retry elsewhere",
    errno.EMFILE: "too many open files in this process: raise `ulimit -n`",
    errno.ENFILE: "too many open files on this machine: raise fs.file-max",
    errno.ESTALE: "the file server has forgotten this folder (removed by another client, or remounted): try again",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows",
    errno.ELOOP: "it is a symbolic link, and links below a root are not followed: a planted one could lead outside; "
    "put the real file or folder there (the root itself may be a link)",
    errno.EEXIST: "it is there already, and nothing is overwritten: choose another name or delete it first",
    errno.ENOENT: "it is not there",
}


def explain(error: OSError, what: str) -> OSError:
    """The same error (errno, class) whose message says what was tried and what to do about it."""
    if error.errno is None:
        return error
    advice = _ADVICE.get(error.errno, error.strerror)
    return OSError(error.errno, f"{what}: {advice}")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Put round system calls only, never round code of the caller, whose errors are not ours to reword."""
    try:
        yield
    except OSError as error:
        raise explain(error, what) from error
