"""The seam of the storage: a rooted place of string keys to bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes. A memoryview must be of format "B"; its memory stays valid and unchanged during the call."""


@dataclass(frozen=True, slots=True)
class Read:
    """One ranged read: `len(into)` bytes of `key` from byte `offset` go into the writable `into`."""

    key: str
    offset: int
    into: memoryview


UploadId: TypeAlias = str
"""Names an upload that is under way; a word of the storage that has begun it."""


@dataclass(frozen=True, slots=True)
class PutPart:
    """What a storage answers for a part of an upload; whoever finishes the upload must show it."""

    number: int
    tag: str
    nbytes: int


class Storage(Protocol):
    """A rooted place of keys to bytes; safe to use from several threads at once.

    A key is a relative POSIX path ("step_100/rank_0.pt"): no empty part, no "." or "..", no backslash,
    no NUL, not absolute (`check_key`). Errors are `OSError`s (`FileNotFoundError`, `FileExistsError`, ...)
    whose message names the key and the redacted URL, says what to do, and holds no credential.
    """

    @property
    def url(self) -> str:
        """Where it is, for people: without user name, password, token or query."""
        ...

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        """Create `key` from the parts, one after the other; give the number of bytes.

        Write-once: `FileExistsError` if the key is there already. When it returns, the content is as
        durable as the place allows (fsynced; acknowledged). If `parts` or a write raises, the key is not
        there afterwards (best effort where the place itself has died); a truncated object is never published.
        Large parts may be written by several threads; parts are consumed in order, each is done with before the
        call returns, so a caller may stream through a bounded window only if the parts are distinct memory.
        """
        ...

    def replace(self, key: str, content: bytes) -> None:
        """Create or overwrite a small object, atomically and durably: readers see the old or the new, never a part.

        On a file system it is written under another name, synced, and renamed over `key`.
        """
        ...

    def read(self, key: str) -> bytes:
        """The whole of a small object. `FileNotFoundError` if it is not there."""
        ...

    def read_into(self, reads: Sequence[Read]) -> None:
        """Fill every destination, many at once. `EOFError` (naming key and range) if an object ends too early."""
        ...

    def size(self, key: str) -> int:
        """Bytes of the object. `FileNotFoundError` if it is not there; never from a stale cache."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names directly below a folder ("" is the root); folders end in "/". A missing folder is empty."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there are passed over."""
        ...

    def delete_tree(self, prefix: str) -> None:
        """Delete a folder and all below it; a missing one is passed over. Does not follow links."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class RenamingStorage(Storage, Protocol):
    """A file system: folders are real, and a folder can be renamed atomically and durably."""

    def make_folder(self, prefix: str, *, exist_ok: bool = False) -> None:
        """Create one folder (parents as needed), durably. `FileExistsError` if there, unless `exist_ok`."""
        ...

    def put_range(self, key: str, offset: int, parts: Iterable[Buffer]) -> int:
        """Write part of an object that several processes make together; give the number of bytes.

        The parts go, one after the other, to the bytes from `offset` on; the object is made by whoever comes first. Its
        range is durable when this returns; the folder is for `sync_folder`. Nothing is taken back if it fails. Ranges
        must not overlap, and all but the last must begin and end on a multiple of 4096 bytes: on network file systems
        two machines must never write to one page.
        """
        ...

    def sync_folder(self, prefix: str) -> None:
        """Make the entries of a folder durable (fsync of the directory)."""
        ...

    def rename_folder(self, source: str, target: str) -> None:
        """Atomically; then make it durable in the parent. `FileExistsError` if the target is there, even empty."""
        ...

    def exchange_folders(self, one: str, other: str) -> bool:
        """Swap two folders atomically and durably; False, with nothing done, where the place cannot do that."""
        ...


@runtime_checkable
class LinkingStorage(Storage, Protocol):
    """A place that has symbolic links. They lead nowhere for `read` and the others, which refuse them."""

    def link(self, key: str, target: str) -> None:
        """Make `key` a symbolic link to `target` (relative to the key's folder), or have a link that is there lead to
        it, atomically. `FileExistsError` where there is something that is no link."""
        ...

    def read_link(self, key: str) -> str | None:
        """Where a link leads; None of what is no link, or not there."""
        ...


@runtime_checkable
class SharedPuts(Storage, Protocol):
    """An object store where several processes can put one object together, in parts, as the uploads of S3 do; and
    where an object can be replaced on the condition that nobody else has done so.

    One begins the upload and tells the others its id; each puts parts, in any order; one finishes it, with what all of
    them were answered. Until then nothing is there. `delete_tree` of a folder aborts the uploads below it.
    """

    def begin_upload(self, key: str) -> UploadId: ...

    def put_parts(
        self, key: str, upload: UploadId, parts: Iterable[Buffer], *, numbers: range, nbytes: int | None = None
    ) -> tuple[PutPart, ...]:
        """Put a stretch of the object, in any number of parts of which each has one of the numbers.

        The object is made of the parts in the order of their numbers, which may have gaps. All parts but the one with
        the highest number must have 5 MiB at least: this sees to it within a stretch whose size is known. `nbytes` is
        that size, for `parts` that do not tell it. Putting a part again replaces it.
        """
        ...

    def finish_upload(self, key: str, upload: UploadId, parts: Sequence[PutPart]) -> None:
        """Make it an object, with the promises of `put`: write-once, whole, durable."""
        ...

    def abort_upload(self, key: str, upload: UploadId) -> None:
        """Drop it with all its parts. Raises nothing: what cannot be dropped is logged, and can be swept later."""
        ...

    def list_uploads(self, prefix: str = "") -> list[tuple[str, UploadId]]:
        """Key and id of every upload that was begun and not finished, below a folder, at any depth."""
        ...

    def swap(self, key: str, old: bytes, new: bytes) -> None:
        """`replace`, but only what still is `old`: `FileExistsError` if another has replaced it, `FileNotFoundError` if
        it is gone. Where the server knows no such condition, it is looked at just before."""
        ...


def check_key(key: str) -> str:
    """Give the key back, or raise `ValueError` if it could point outside the root."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in key or "\0" in key or ":" in parts[0]:
        raise ValueError(f"{key!r} is not a storage key: it must be a plain relative path such as 'step_100/rank_0.pt'")
    return key


def check_folder(prefix: str) -> str:
    """Give the folder's key without its closing "/"; "" is the root. `ValueError` if it could point outside."""
    return check_key(prefix.removesuffix("/")) if prefix else prefix
