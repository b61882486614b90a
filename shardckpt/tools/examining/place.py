"""What a place can do, found by trying it in a folder of its own, which is gone afterwards. No torch."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.tools.examining.findings import Finding, bytes_text
from shardckpt.tools.examining.rates import latencies, rates

_SKEW_S = 60.0
"""Seconds of difference between clocks that are worth knowing. S3 refuses requests from 15 minutes on."""
_REFUSED_S = 900.0


@runtime_checkable
class AsksServer(Protocol):
    """A storage whose server may, or may not, refuse to create what is there."""

    def refuses_to_replace(self) -> bool: ...


@runtime_checkable
class HasClock(Protocol):
    """A storage that says when an object was made, by its own clock."""

    def modified(self, key: str) -> float: ...


def examine_place(storage: Storage, *, nbytes: int) -> list[Finding]:
    """All findings of a place. `OSError` if nothing can be put there at all. `nbytes`: of the file for the rates."""
    with leaving_nothing(storage) as folder:
        storage.put(f"{folder}/first", [b"1"])
        checks: list[Callable[[], Iterator[Finding]]] = [
            lambda: _space(storage, nbytes),
            lambda: _write_once(storage, folder),
            lambda: _read_after_write(storage, folder),
            lambda: _folders(storage, folder),
            lambda: _clock(storage, folder),
            lambda: latencies(storage, folder),
            lambda: rates(storage, folder, nbytes=nbytes),
        ]
        return [finding for check in checks for finding in _found(check)]


@contextmanager
def leaving_nothing(storage: Storage) -> Iterator[str]:
    """A folder of this examination's own; afterwards it is gone, and so is a root that was made for it."""
    folder = f"examined-{secrets.token_hex(8)}"
    made = [path for path in _above(storage) if not path.exists()]
    try:
        yield folder
    finally:
        storage.delete_tree(folder)
        for path in made:  # the innermost first; one in which something else lies by now stays
            with suppress(OSError):
                path.rmdir()


def _above(storage: Storage) -> list[Path]:
    root = Path(storage.url) if isinstance(storage, LocalStorage) else None
    return [root, *root.parents] if root is not None else []


def _found(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except (OSError, EOFError) as error:
        yield Finding("access", "problem", str(error), "see that this user may read, write, list and delete there")


def _space(storage: Storage, nbytes: int) -> Iterator[Finding]:
    if not isinstance(storage, LocalStorage):
        return
    found = os.statvfs(storage.url)
    free = found.f_bavail * found.f_frsize
    what = f"{bytes_text(free)} free, {_file_system(storage.url)}"
    if free < 4 * nbytes or (found.f_files and found.f_favail < 1000):
        yield Finding("space", "problem", what, "there is hardly room for a checkpoint: free some, or prune", free, "B")
    else:
        yield Finding("space", "good", what, "", free, "B")


def _file_system(path: str) -> str:
    """By /proc/self/mountinfo: the mount with the longest path above this one; of several there the last."""
    best, kind = "", "unknown"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, after = line.split()[4], line.partition(" - ")[2].split()
            inside = os.path.commonpath([mount, os.path.realpath(path)]) == mount
            if inside and after and len(mount) >= len(best):
                best, kind = mount, after[0]
    return kind


def _write_once(storage: Storage, folder: str) -> Iterator[Finding]:
    try:
        storage.put(f"{folder}/first", [b"2"])
    except FileExistsError:
        yield Finding("write once", "good", "what is there is not created again")
    else:
        yield Finding("write once", "problem", "a second put replaced the first", "committed steps are not safe there")
    if isinstance(storage, AsksServer):
        if storage.refuses_to_replace():
            yield Finding("conditional put", "good", "the server itself refuses to create what is there")
        else:
            advice = (
                "each put looks first and reads back afterwards: two requests more, and of two writers of one name "
                "at the same moment both may be told that they lost; a server that knows If-None-Match is better"
            )
            yield Finding("conditional put", "note", "the server does not know the condition", advice)


def _read_after_write(storage: Storage, folder: str) -> Iterator[Finding]:
    content = secrets.token_bytes(1000)
    storage.put(f"{folder}/read", [content])
    same = storage.read(f"{folder}/read") == content and storage.size(f"{folder}/read") == len(content)
    listed = "read" in storage.list(folder)
    storage.replace(f"{folder}/read", content[:500])
    again = storage.read(f"{folder}/read") == content[:500]
    storage.delete([f"{folder}/read"])
    gone = "read" not in storage.list(folder)
    lacks = [
        what
        for what, there in (("read", same), ("listed", listed), ("replaced", again), ("deleted", gone))
        if not there
    ]
    if lacks:
        advice = "a checkpoint could be missed, or seen when it is gone; caches in between must be switched off"
        yield Finding("read after write", "problem", f"not seen at once: what was {', '.join(lacks)}", advice)
    else:
        yield Finding("read after write", "good", "what was written, replaced or deleted is seen at once")


def _folders(storage: Storage, folder: str) -> Iterator[Finding]:
    if not isinstance(storage, RenamingStorage):
        return
    one, two = f"{folder}/one", f"{folder}/two"
    storage.put(f"{one}/file", [b"1"])
    storage.rename_folder(one, two)
    storage.put(f"{one}/file", [b"2"])
    try:
        storage.rename_folder(one, two)
    except FileExistsError:
        yield Finding("rename", "good", "a folder is renamed in one operation, and never over another")
    else:
        yield Finding("rename", "problem", "a folder was renamed over another", "committed steps are not safe there")
        return
    if storage.exchange_folders(one, two):
        yield Finding("exchange", "good", "a step that is saved again is exchanged in one operation")
    else:
        advice = "a step that is saved again takes two renames; a crash between them is seen and undone by readers"
        yield Finding("exchange", "note", "two folders cannot be exchanged (NFS, some FUSE)", advice)
    if isinstance(storage, LocalStorage):
        yield _direct(storage.path_of(f"{two}/file"))


def _direct(path: str) -> Finding:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0)))
    except OSError:
        advice = "writing goes through the page cache, and takes processor time and memory from training"
        return Finding("direct I/O", "note", "is not there", advice)
    return Finding("direct I/O", "good", "writing can pass the page cache by")


def _clock(storage: Storage, folder: str) -> Iterator[Finding]:
    """By how much the place's clock is ahead; object stores tell whole seconds."""
    key, before = f"{folder}/clock", time.time()
    storage.put(key, [b"1"])
    after = time.time()
    if isinstance(storage, LocalStorage):
        made = os.stat(storage.path_of(key)).st_mtime
    elif isinstance(storage, HasClock):
        made = storage.modified(key)
    else:
        return
    ahead = made - before if made < before - 1 else max(0.0, made - after)
    what = f"differs by {abs(ahead):.1f} s from this machine's" if abs(ahead) >= 1 else "agrees with this machine's"
    if abs(ahead) < _SKEW_S:
        yield Finding("clock", "good", what, "", ahead, "s")
    else:
        advice = "the ages that are shown are off by that; S3 refuses requests from 15 min on: run an NTP client"
        yield Finding("clock", "problem" if abs(ahead) >= _REFUSED_S else "note", what, advice, ahead, "s")
