"""A snapshot in the cache of the Hugging Face hub: files that are links to `../../blobs/<digest>`, and to nothing else.

Source of the layout: "Understand caching" in the documentation of `huggingface_hub`. A storage follows no links, so
that nothing outside of a folder is read; these are followed by their names, which can lead to that one folder only.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence

from shardckpt.storage.base import Read, check_key
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.tools.place import Place

_BLOB = re.compile(r"blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})")


def in_hub_cache(place: Place) -> Place:
    """The same place; if it is a snapshot in a hub's cache, with its links followed."""
    storage = place.storage
    if not isinstance(storage, LocalStorage) or place.folder or place.file:
        return place
    above, revision = os.path.split(storage.url)
    repository, name = os.path.split(above)
    if name != "snapshots" or not os.path.isdir(os.path.join(repository, "blobs")):
        return place
    return Place(_Snapshot(LocalStorage(repository), f"snapshots/{revision}"))


class _Snapshot(StorageWrapper):
    """Reads the files of a snapshot, by their names in it."""

    inner: LocalStorage

    def __init__(self, inner: LocalStorage, folder: str) -> None:
        super().__init__(inner)
        self._folder = folder

    @property
    def url(self) -> str:
        return f"{self.inner.url}/{self._folder}"

    def list(self, prefix: str = "") -> list[str]:
        return self.inner.list(f"{self._folder}/{prefix}" if prefix else self._folder)

    def size(self, key: str) -> int:
        return self.inner.size(self._target(key))

    def read(self, key: str) -> bytes:
        return self.inner.read(self._target(key))

    def read_into(self, reads: Sequence[Read]) -> None:
        self.inner.read_into([Read(self._target(read.key), read.offset, read.into) for read in reads])

    def _target(self, key: str) -> str:
        """Where the file lies; a link that leads elsewhere is left as it is, and refused by the storage."""
        own = f"{self._folder}/{check_key(key)}"
        try:
            link = os.readlink(self.inner.path_of(own))
        except OSError:
            return own
        target = posixpath.normpath(posixpath.join(posixpath.dirname(own), link))
        return target if _BLOB.fullmatch(target) else own
