"""Runs for these tests, made by storage calls alone, and what a reader makes of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from shardckpt.format.layout import MANIFEST, aside_folder, new_attempt, step_folder
from shardckpt.format.manifest import FileEntry, Manifest, encode_manifest
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import RenamingStorage, Storage

FILES: Mapping[str, bytes] = MappingProxyType(
    {"model.pt": b"weights", "rank_0.pt": b"shard 0", "rank_1.pt": b"shard 1", "tokenizer/vocab.json": b"{}"}
)


def record_of(
    step: int,
    attempt: str,
    *,
    files: Mapping[str, bytes] = FILES,
    prefix: str = "",
    created: str = "2026-01-01T00:00:00Z",
) -> Manifest:
    entries = tuple(
        FileEntry(f"{prefix}{name}", len(content), zlib.crc32(content), kind="rank", writer=0)
        for name, content in files.items()
    )
    return Manifest(step, attempt, created, (0,), entries)


def fill(storage: Storage, folder: str, files: Mapping[str, bytes] = FILES) -> None:
    for name, content in files.items():
        storage.put(f"{folder}/{name}", [content])


def commit(storage: Storage, step: int, *, attempt: str | None = None, folder: str | None = None, **record: Any) -> str:
    """A committed step, as the engine leaves it; on a file system perhaps in another folder. Gives its attempt."""
    attempt = attempt or new_attempt()
    files = record.pop("files", FILES)
    if isinstance(storage, RenamingStorage):
        manifest = record_of(step, attempt, files=files, **record)
        folder = folder or step_folder(step)
        fill(storage, folder, files)
    else:
        manifest = record_of(step, attempt, files=files, prefix=f"{attempt}/", **record)
        folder = step_folder(step)
        fill(storage, f"{folder}/{attempt}", files)
    storage.put(f"{folder}/{MANIFEST}", [encode_manifest(manifest)])
    return attempt


def start_attempt(storage: Storage, step: int, attempt: str, files: Mapping[str, bytes] = FILES) -> str:
    """Files of an attempt that has not committed. Gives their folder."""
    renames = isinstance(storage, RenamingStorage)
    folder = aside_folder(step, attempt, "tmp") if renames else f"{step_folder(step)}/{attempt}"
    fill(storage, folder, files)
    return folder


def is_whole(storage: Storage, step: int) -> bool:
    """Whether every file that the step's record names is there with its bytes. Errors if the step is not there."""
    folder, manifest = Catalog(storage).record(step)
    try:
        contents = [storage.read(f"{folder}/{file.name}") for file in manifest.files]
    except FileNotFoundError:
        return False
    return [zlib.crc32(content) for content in contents] == [file.crc for file in manifest.files]


def walk(storage: Storage, prefix: str = "") -> Iterator[str]:
    """All keys below a folder; empty folders as their name with a slash."""
    names = storage.list(prefix)
    if prefix and not names:
        yield f"{prefix}/"
    for name in names:
        path = f"{prefix}/{name}" if prefix else name
        if name.endswith("/"):
            yield from walk(storage, path[:-1])
        else:
            yield path
