"""Storages whose process dies or whose machine loses power, and storages that others change meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from shardckpt.format.layout import MANIFEST
from shardckpt.storage.base import Storage
from shardckpt.storage.wrapping import Operation, StorageWrapper
from tests.run.making import walk

T = TypeVar("T")

READING = frozenset({"read", "read_into", "size", "list"})


class Killed(BaseException):
    """The process ends here. Not an `Exception`: nothing may catch it and go on."""


class DyingStorage(StorageWrapper):
    """Does `lives` operations, then raises `Killed` for ever. Bulk deletions are done, and so cut, key by key."""

    def __init__(self, inner: Storage, lives: int, *, backwards: bool = False) -> None:
        super().__init__(inner)
        self.lives = lives
        self.backwards = backwards
        """Trees are deleted in reverse order: no order is promised."""

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        if self.lives <= 0:
            raise Killed(operation)
        self.lives -= 1
        return call()

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            super().delete([key])

    def delete_tree(self, prefix: str) -> None:
        self.delete(sorted(walk_files(self.inner, prefix), reverse=self.backwards))
        super().delete_tree(prefix)


class ClumsyStorage(DyingStorage):
    """A file system that cannot exchange folders."""

    def exchange_folders(self, one: str, other: str) -> bool:
        return False


class PowerCutStorage(DyingStorage):
    """When it dies, what was removed since the last sync of its folder is back: the worst that a file system may do.

    Only records come back: that the files do not is worse.
    """

    def __init__(self, inner: Storage, lives: int, *, backwards: bool = False) -> None:
        super().__init__(inner, lives, backwards=backwards)
        self.unsynced: dict[str, bytes] = {}

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        if operation.name == "delete" and operation.key.endswith(MANIFEST) and self.lives > 0:
            self.unsynced[operation.key] = self.inner.read(operation.key)
        result = super().around(operation, call)
        if operation.name == "sync_folder":
            self.unsynced = {key: data for key, data in self.unsynced.items() if key != f"{operation.key}/{MANIFEST}"}
        return result

    def restart(self) -> None:
        for key, content in self.unsynced.items():
            self.inner.put(key, [content])


class WatchedStorage(StorageWrapper):
    """Calls `before` with each operation before it is done: another process acts in between."""

    def __init__(self, inner: Storage, before: Callable[[Operation], None]) -> None:
        super().__init__(inner)
        self.before = before

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        self.before(operation)
        return call()


def walk_files(storage: Storage, prefix: str) -> list[str]:
    return [key for key in walk(storage, prefix) if not key.endswith("/")]
