"""Files that several steps refer to: put once, under a digest of their content. Why it is safe is said in BLOBS.md."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

from shardckpt.format.checksum import crc32
from shardckpt.format.layout import BLOBS, blob_folder, doomed_blobs, is_attempt, new_attempt, wanted_file
from shardckpt.format.record.files import FileEntry
from shardckpt.storage.base import Read, RenamingStorage, Storage

_log = logging.getLogger(__name__)

_WINDOW = 4 << 20
"""Bytes of a blob in memory at once while it is looked through."""


class Blobs:
    """One per saver; used on the save thread of every rank, or what it writes in."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._sound: set[str] = set()
        """Keys of what this process has put, or has looked through to the last byte."""

    def have(
        self,
        prefix: str,
        entry: FileEntry,
        digest: str,
        parts: Iterable[memoryview],
        *,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[FileEntry, bool]:
        """The entry with its blob, which is there and durable when this returns; and whether it was put for that.

        `prefix`: of the attempt, which must have begun: on a file system its folder is there. `check` raises where
        the save is to stop.
        """
        if not isinstance(self._storage, RenamingStorage):
            self._storage.put(f"{prefix}/{wanted_file(entry.name)}", [digest.encode()])  # so that the attempt is seen
        found = self._find(entry, digest, check)
        return replace(entry, blob=found or self._put(entry, digest, parts)), not found

    def _find(self, entry: FileEntry, digest: str, check: Callable[[], None]) -> str:
        """The key of a whole and durable blob of this content that nobody is about to delete; empty if none is."""
        above = f"{BLOBS}/{digest}"
        names = self._storage.list(above)
        doomed = doomed_blobs(names)
        for number in (name[:-1] for name in names if name.endswith("/")):
            key = f"{above}/{number}/{entry.name}"
            if is_attempt(number) and number not in doomed and self._is_whole(key, entry, check):
                if isinstance(self._storage, RenamingStorage):
                    self._storage.sync_folder(above)  # whoever has renamed it may have died before doing so
                return key
        return ""

    def _is_whole(self, key: str, entry: FileEntry, check: Callable[[], None]) -> bool:
        """By its size and its end, each time; by all of its bytes, once in the life of this process."""
        try:
            if self._storage.size(key) != entry.nbytes:
                return False
            for extent in (entry.index, entry.tree):
                if extent is not None and self._sum(key, extent[0], extent[1], check) != extent[2]:
                    return False
            if key not in self._sound and self._sum(key, 0, entry.nbytes, check) != entry.crc:
                _log.warning("%s in %s is damaged, and steps refer to it: see verify", key, self._storage.url)
                return False
        except (FileNotFoundError, EOFError):
            return False
        self._sound.add(key)
        return True

    def _sum(self, key: str, start: int, nbytes: int, check: Callable[[], None]) -> int:
        crc, window = 0, memoryview(bytearray(min(nbytes, _WINDOW)))
        for at in range(start, start + nbytes, _WINDOW):
            check()
            part = window[: min(_WINDOW, start + nbytes - at)]
            self._storage.read_into([Read(key, at, part)])
            crc = crc32(part, crc)
        return crc

    def _put(self, entry: FileEntry, digest: str, parts: Iterable[memoryview]) -> str:
        """On a file system it gets its name when it is whole and durable: a file of that name is never part of one."""
        folder = blob_folder(digest, new_attempt())
        key = f"{folder}/{entry.name}"
        if isinstance(self._storage, RenamingStorage):
            unfinished = f"{folder}.tmp"
            self._storage.make_folder(unfinished)
            try:
                self._storage.put(f"{unfinished}/{entry.name}", parts)
                self._storage.rename_folder(unfinished, folder)
            except BaseException:
                with suppress(OSError):
                    self._storage.delete_tree(unfinished)
                raise
        else:
            self._storage.put(key, parts)
        self._sound.add(key)
        return key
