"""Which blobs the records of a run refer to. Rank 0 only, in any one thread.

In doubt the answer is that it cannot be told: while a save is under way, where a record is damaged or lost, or where
something moves under our eyes. See `shardckpt/engine/writing/BLOBS.md`.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardckpt.errors import CheckpointError
from shardckpt.format.layout import BLOBS, CARBON_COPY, MANIFEST, SET_ASIDE, is_attempt, parse_aside, parse_step
from shardckpt.format.manifest import Manifest, decode_manifest
from shardckpt.format.reduced import may_be_doomed
from shardckpt.run.requests import each
from shardckpt.storage.base import RenamingStorage, Storage


class UnknownReferencesError(CheckpointError):
    """It cannot be told now which blobs are referred to; the message says why."""


def references(storage: Storage) -> frozenset[str]:
    """The keys of all blobs that any record below the root refers to, in force or not.

    `UnknownReferencesError` if there may be others; `OSError` of the storage.
    """
    names = _folders(storage)
    found = [key for keys in each(lambda folder: _of_folder(storage, folder), names) for key in keys]
    if _folders(storage) != names:  # a listing may miss what is renamed while it is made; two in a row do not
        raise UnknownReferencesError("steps come or go at this moment")
    return frozenset(found)


def _folders(storage: Storage) -> list[str]:
    return [name[:-1] for name in storage.list() if name.endswith("/") and name[:-1] not in (BLOBS, CARBON_COPY)]


def _of_folder(storage: Storage, folder: str) -> list[str]:
    """Of one folder of the root: a step, an older version of one, an attempt, a copy, or something of others."""
    if not isinstance(storage, RenamingStorage) and parse_step(folder) is not None:
        return _of_objects(storage, folder)
    record = _record(storage, folder)
    if record is not None:
        return _blobs(record)
    aside = parse_aside(folder)
    if aside is not None and aside.kind == "tmp":
        raise UnknownReferencesError(f"{folder} may be a save under way")
    step = parse_step(folder.removeprefix(SET_ASIDE).partition(".")[0])
    if aside is None and step is not None and _has_ours(storage.list(folder)):
        raise UnknownReferencesError(f"{folder} has lost its record")
    return []


def _of_objects(storage: Storage, folder: str) -> list[str]:
    """On an object store. Attempts are listed before the record is read: one that commits meanwhile is among them."""
    names = storage.list(folder)
    attempts = {name[:-1] for name in names if name.endswith("/") and is_attempt(name[:-1])}
    record = _record(storage, folder) if MANIFEST in names else None
    others = attempts - {record.attempt} if record is not None else attempts
    if others:
        raise UnknownReferencesError(f"{folder}/{min(others)} may be a save under way")
    if MANIFEST in names and record is None:
        raise UnknownReferencesError(f"{folder} is being deleted")
    return _blobs(record) if record is not None else []


def _record(storage: Storage, folder: str) -> Manifest | None:
    try:
        return decode_manifest(storage.read(f"{folder}/{MANIFEST}"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UnknownReferencesError(f"the record in {folder} cannot be read: {error}") from error


def _has_ours(names: Sequence[str]) -> bool:
    """Whether these may be the files of a step of ours whose record is lost."""
    return any(may_be_doomed(name) or name.startswith(MANIFEST) for name in names)


def _blobs(record: Manifest) -> list[str]:
    return [file.blob for file in record.files if file.blob]
