"""Deletion of blobs that nothing refers to any more. Rank 0 only, in any one thread.

Why nobody can come to refer to one at the last moment is said in `shardckpt/engine/writing/BLOBS.md`.
"""

from __future__ import annotations

import logging

from shardckpt.format.layout import BLOBS, blob_folder, doomed_blobs, doomed_file, is_attempt
from shardckpt.run.requests import each
from shardckpt.run.shared.references import UnknownReferencesError, references
from shardckpt.storage.base import Storage

_log = logging.getLogger(__name__)

_Blob = tuple[str, str]
"""Digest and id."""


def sweep_blobs(storage: Storage) -> list[str]:
    """Delete the blobs that no record refers to, also those that were never finished; give their folders.

    Nothing is deleted while it cannot be told what is referred to, which is logged. `OSError` of the storage; then some
    may be gone, and what is left is deleted another time.
    """
    there = _blobs(storage)
    if not there:
        return []
    try:
        doomed = _unnamed(there, references(storage))
        marks = each(lambda blob: _mark(storage, blob), doomed)
        if not marks:
            return []
        try:
            spared = set(doomed) - set(_unnamed(doomed, references(storage)))
        except UnknownReferencesError:
            storage.delete(marks)
            raise
    except UnknownReferencesError as error:
        _log.info("no blobs of %s are deleted now: %s", storage.url, error)
        return []
    storage.delete([mark for mark, blob in zip(marks, doomed, strict=True) if blob in spared])
    gone = [blob for blob in doomed if blob not in spared]
    for blob in gone:
        _delete(storage, blob)
    return [_folder(blob) for blob in gone]


def tidy_blobs(storage: Storage) -> None:
    """The same after a deletion of steps, which has succeeded whatever happens here."""
    try:
        sweep_blobs(storage)
    except OSError as error:
        _log.warning("blobs of %s that no step refers to any more were not deleted: %s", storage.url, error)


def _blobs(storage: Storage) -> list[_Blob]:
    """All of them, whole or not."""
    digests = [name[:-1] for name in storage.list(BLOBS) if name.endswith("/")]
    inside = each(lambda digest: storage.list(f"{BLOBS}/{digest}"), digests)
    return [
        (digest, name[:-1])
        for digest, names in zip(digests, inside, strict=True)
        for name in names
        if name.endswith("/") and is_attempt(name[:-1].removesuffix(".tmp"))
    ]


def _unnamed(blobs: list[_Blob], named: frozenset[str]) -> list[_Blob]:
    folders = {key.rpartition("/")[0] for key in named}
    return [blob for blob in blobs if _folder(blob) not in folders]


def _folder(blob: _Blob) -> str:
    return blob_folder(*blob)


def _mark(storage: Storage, blob: _Blob) -> str:
    """From now on no save that looks for it takes it; durable when this returns."""
    digest, number = blob
    key = f"{BLOBS}/{digest}/{doomed_file(number.removesuffix('.tmp'))}"
    storage.put(key, [number.encode()])
    return key


def _delete(storage: Storage, blob: _Blob) -> None:
    """The marks go last: as long as there is anything of a blob, it is not taken."""
    digest, number = blob
    storage.delete_tree(_folder(blob))
    own, names = {number.removesuffix(".tmp")}, storage.list(f"{BLOBS}/{digest}")
    storage.delete([f"{BLOBS}/{digest}/{name}" for name in names if doomed_blobs([name]) == own])
    _log.info("deleted %s in %s, which no step refers to any more", _folder(blob), storage.url)
