"""Folders below a root, reached one by one through descriptors, so that no symbolic link can lead outside.

Why descriptors and not `realpath` of the parent: between looking and opening, somebody can put a link in the place of a
folder that was looked at. `openat(O_NOFOLLOW)` from one folder's descriptor to the next leaves no such moment, works on
every POSIX system, and costs about 3 us per level. Only the root itself may be a link: it is the user's own word.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def opened_folder(root: str, parts: Sequence[str]) -> Iterator[int]:
    """`open_folder`, closed at the end of the block."""
    folder = open_folder(root, parts)
    try:
        yield folder
    finally:
        let_go(folder)


def let_go(descriptor: int) -> None:
    """Close what was open for reading: a folder, or a file. Nothing was written through it, so nothing can be lost."""
    with suppress(OSError):  # it is closed, whatever Linux says
        os.close(descriptor)


def open_folder(root: str, parts: Sequence[str], *, create: bool = False) -> int:
    """A descriptor of the folder `root/parts[0]/...`, to be closed by the caller.

    `FileNotFoundError` if one is missing (unless `create`), `NotADirectoryError` if one is a file, `OSError(ELOOP)` if
    one is a link.
    """
    try:
        return _walk(os.open(root, _FOLDER), parts, _open_below)
    except FileNotFoundError:
        if not create:
            raise
    # Only now: that nothing is missing is the usual case, and looking costs less than fsyncs.
    _make_root(root)
    return _walk(os.open(root, _FOLDER), parts, _make_below)


def _walk(folder: int, parts: Sequence[str], step: Callable[[int, str], int]) -> int:
    try:
        for part in parts:
            above, folder = folder, step(folder, part)
            let_go(above)
    except BaseException:
        let_go(folder)
        raise
    return folder


def _make_below(folder: int, name: str) -> int:
    # A folder that is there may have been made by another process this very moment and not be durable yet: the fsync
    # covers that case as well; of an unchanged folder it costs microseconds.
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=folder)
    sync_descriptor(folder)
    return _open_below(folder, name)


def _open_below(folder: int, name: str) -> int:
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    except NotADirectoryError:
        # Linux says ENOTDIR for a link here, too; other systems say ELOOP.
        regular_or_folder(os.stat(name, dir_fd=folder, follow_symlinks=False))
        raise


def regular_or_folder(found: os.stat_result) -> os.stat_result:
    """Give the entry's data back, or raise `OSError` if it is a link (ELOOP), a pipe, a socket or a device."""
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EINVAL, "it is neither a regular file nor a folder: remove it")
    return found


def _make_root(root: str) -> None:
    missing = []
    while not os.path.isdir(root):
        missing.append(root)
        root = os.path.dirname(root)
    for path in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(path)
        above = os.open(os.path.dirname(path), _FOLDER)
        try:
            sync_descriptor(above)
        finally:
            let_go(above)


def sync_descriptor(folder: int) -> None:
    """Make the entries of a folder durable."""
    try:
        os.fsync(folder)
    except OSError as error:
        # Some network and FUSE file systems have no fsync of folders: their entries are durable as they are made, or
        # there is no way to make them so. Everything else is a failure.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def remove_tree(folder: int, name: str) -> None:
    """Remove the entry `name` of `folder` and all below it; links are removed, not followed; missing is fine."""
    try:
        below = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        return
    try:
        # A writer of an abandoned attempt may still be adding files; look again a few times, then say so.
        for attempt in range(8):
            _remove_entries(below)
            try:
                os.rmdir(name, dir_fd=folder)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 7:
                    raise
            else:
                return
    finally:
        let_go(below)


def _remove_entries(folder: int) -> None:
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if is_folder:
            remove_tree(folder, name)
        else:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
