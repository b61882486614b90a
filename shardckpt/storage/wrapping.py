"""A storage round a storage, which stays a `RenamingStorage`, or a `SharedPuts`, exactly if the inner one is."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from shardckpt.storage.base import Buffer, PutPart, Read, RenamingStorage, SharedPuts, Storage, UploadId

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Operation:
    """One call on a storage: the method's name, and the keys or folders that it was given."""

    name: str
    keys: tuple[str, ...] = ()
    idempotent: bool = False
    """Doing it twice leaves and gives what doing it once does."""

    @property
    def key(self) -> str:
        """The first key; "" if there is none."""
        return self.keys[0] if self.keys else ""


class StorageWrapper:
    """Hands every call to `inner` through `around`, which a subclass overrides; or it overrides single methods.

    Making one (`RetryingStorage(inner)`) gives an object of that class or, if `inner` can rename folders, of a class
    derived from it that has the five renaming methods as well: `isinstance(it, RenamingStorage)` is right both ways.
    The same with the six methods of a `SharedPuts`.
    """

    def __new__(cls, inner: Storage, *_args: Any, **_options: Any) -> Any:
        for protocol, methods in ((RenamingStorage, _Renames), (SharedPuts, _Shares)):
            if isinstance(inner, protocol) and not issubclass(cls, methods):
                return object.__new__(_with(cls, methods))
        return object.__new__(cls)

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        """Do the operation (or not). Called in the thread of the caller."""
        return call()

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def retries(self) -> int:
        """How many tries the inner storage has made beyond the first ones; 0 if it does not count them."""
        return int(getattr(self.inner, "retries", 0))

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        return self.around(Operation("put", (key,)), lambda: self.inner.put(key, parts))

    def replace(self, key: str, content: bytes) -> None:
        self.around(Operation("replace", (key,), idempotent=True), lambda: self.inner.replace(key, content))

    def read(self, key: str) -> bytes:
        return self.around(Operation("read", (key,), idempotent=True), lambda: self.inner.read(key))

    def read_into(self, reads: Sequence[Read]) -> None:
        keys = tuple(dict.fromkeys(read.key for read in reads))
        self.around(Operation("read_into", keys, idempotent=True), lambda: self.inner.read_into(reads))

    def size(self, key: str) -> int:
        return self.around(Operation("size", (key,), idempotent=True), lambda: self.inner.size(key))

    def list(self, prefix: str = "") -> list[str]:
        return self.around(Operation("list", (prefix,), idempotent=True), lambda: self.inner.list(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        every = tuple(keys)
        self.around(Operation("delete", every, idempotent=True), lambda: self.inner.delete(every))

    def delete_tree(self, prefix: str) -> None:
        self.around(Operation("delete_tree", (prefix,), idempotent=True), lambda: self.inner.delete_tree(prefix))

    def close(self) -> None:
        self.around(Operation("close"), self.inner.close)


class _Renames(StorageWrapper):
    """The renaming half of a wrapper whose inner storage is a `RenamingStorage`."""

    inner: RenamingStorage

    def make_folder(self, prefix: str, *, exist_ok: bool = False) -> None:
        operation = Operation("make_folder", (prefix,), idempotent=exist_ok)
        self.around(operation, lambda: self.inner.make_folder(prefix, exist_ok=exist_ok))

    def put_range(self, key: str, offset: int, parts: Iterable[Buffer]) -> int:
        return self.around(Operation("put_range", (key,)), lambda: self.inner.put_range(key, offset, parts))

    def sync_folder(self, prefix: str) -> None:
        self.around(Operation("sync_folder", (prefix,)), lambda: self.inner.sync_folder(prefix))

    def rename_folder(self, source: str, target: str) -> None:
        self.around(Operation("rename_folder", (source, target)), lambda: self.inner.rename_folder(source, target))

    def exchange_folders(self, one: str, other: str) -> bool:
        return self.around(Operation("exchange_folders", (one, other)), lambda: self.inner.exchange_folders(one, other))


class _Shares(StorageWrapper):
    """The half of a wrapper whose inner storage is a `SharedPuts`."""

    inner: SharedPuts

    def begin_upload(self, key: str) -> UploadId:
        return self.around(Operation("begin_upload", (key,)), lambda: self.inner.begin_upload(key))

    def put_parts(
        self, key: str, upload: UploadId, parts: Iterable[Buffer], *, numbers: range, nbytes: int | None = None
    ) -> tuple[PutPart, ...]:
        put = partial(self.inner.put_parts, numbers=numbers, nbytes=nbytes)
        return self.around(Operation("put_parts", (key,)), lambda: put(key, upload, parts))

    def finish_upload(self, key: str, upload: UploadId, parts: Sequence[PutPart]) -> None:
        self.around(Operation("finish_upload", (key,)), lambda: self.inner.finish_upload(key, upload, parts))

    def abort_upload(self, key: str, upload: UploadId) -> None:
        self.around(Operation("abort_upload", (key,), idempotent=True), lambda: self.inner.abort_upload(key, upload))

    def list_uploads(self, prefix: str = "") -> builtins.list[tuple[str, UploadId]]:
        return self.around(
            Operation("list_uploads", (prefix,), idempotent=True), lambda: self.inner.list_uploads(prefix)
        )

    def swap(self, key: str, old: bytes, new: bytes) -> None:
        self.around(Operation("swap", (key,)), lambda: self.inner.swap(key, old, new))


def _with(cls: type[StorageWrapper], methods: type[StorageWrapper]) -> type[StorageWrapper]:
    bases = (methods,) if cls is StorageWrapper else (cls, methods)
    return type(cls.__name__, bases, {"__doc__": cls.__doc__, "__module__": cls.__module__})
