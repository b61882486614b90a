"""Runs for these tests, made by storage calls alone, and what a reader makes of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from shardckpt.format.index import StoredBox, StoredRecord, encode_index
from shardckpt.format.layout import MANIFEST, aside_folder, new_attempt, step_folder
from shardckpt.format.manifest import FileEntry, LayoutEntry, Manifest, Table, TensorEntry, encode_manifest
from shardckpt.format.placement import Box
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import RenamingStorage, Storage


@dataclass(frozen=True)
class Shape:
    """What a step consists of: its files, what its record says of them, and which of them hold its model."""

    files: Mapping[str, bytes]
    kinds: Mapping[str, str]
    tables: tuple[Table, ...]
    layouts: tuple[LayoutEntry, ...]
    model: frozenset[str]
    """The files that stay when only the model does, with those that are none of ours."""


W, M = TensorEntry("float32", (2,), 0), TensorEntry("float32", (2,), 1)
INDEX = encode_index([StoredRecord("float32", (2,), 0, 8, 7)], [StoredBox("model.w", 0, (2,), Box((0,), (2,), (0,)))])
OTHERS: Mapping[str, bytes] = MappingProxyType({"tokenizer/vocab.json": b"{}"})

OWN = Shape(
    {"model.pt": b"weights", "rank_0.pt": b"shard 0", "rank_1.pt": b"shard 1", **OTHERS},
    {"model.pt": "model", "rank_0.pt": "rank", "rank_1.pt": "rank"},
    (Table((0, 1), {"model.w": W, "optimizer.m": M}, {"step": "rank"}),),
    (LayoutEntry("model"), LayoutEntry("rank")),
    frozenset({"model.pt", *OTHERS}),
)
"""The model lies in a file of its own."""
SCATTERED = Shape(
    {"rank_0.pt": b"0", "rank_1.pt": b"1", "replicated.pt": b"both", "metadata.pt": b"mine", **OTHERS},
    {"rank_0.pt": "rank", "rank_1.pt": "rank", "replicated.pt": "replicated", "metadata.pt": "metadata"},
    (Table((0, 1), {"model.w": M}, {"step": "rank", "lr": "replicated"}),),
    (LayoutEntry("replicated"), LayoutEntry("rank")),
    frozenset({"rank_0.pt", "rank_1.pt", *OTHERS}),
)
"""The model lies in the files of the ranks, with their other state."""
CONSOLIDATED = Shape(
    {**SCATTERED.files, "model.pt": INDEX + b"tree"},
    {**SCATTERED.kinds, "model.pt": "consolidated"},
    SCATTERED.tables,
    SCATTERED.layouts,
    frozenset({"model.pt", *OTHERS}),
)
"""The same, and once more in a file of its own."""
MODELLESS = Shape({"rank_0.pt": b"0"}, {"rank_0.pt": "rank"}, (Table((0,), {}, {"step": "rank"}),), (), frozenset())

FILES = OWN.files


def record_of(
    step: int,
    attempt: str,
    *,
    files: Mapping[str, bytes] | None = None,
    prefix: str = "",
    created: str = "2026-01-01T00:00:00Z",
    shape: Shape = OWN,
) -> Manifest:
    entries = []
    for name, content in (shape.files if files is None else files).items():
        kind, extents = shape.kinds.get(name, "cc"), ()
        if kind == "consolidated":
            extents = ((0, len(INDEX), zlib.crc32(INDEX)), (len(INDEX), 4, zlib.crc32(b"tree")))
        entries.append(FileEntry(f"{prefix}{name}", len(content), zlib.crc32(content), kind, 0, *extents))
    return Manifest(step, attempt, created, (0, 0), tuple(entries), layouts=shape.layouts, tables=shape.tables)


def fill(storage: Storage, folder: str, files: Mapping[str, bytes] = FILES) -> None:
    for name, content in files.items():
        storage.put(f"{folder}/{name}", [content])


def commit(storage: Storage, step: int, *, attempt: str | None = None, folder: str | None = None, **record: Any) -> str:
    """A committed step, as the engine leaves it; on a file system perhaps in another folder. Gives its attempt."""
    attempt = attempt or new_attempt()
    files = record.get("files") or record.get("shape", OWN).files
    if isinstance(storage, RenamingStorage):
        manifest = record_of(step, attempt, **record)
        folder = folder or step_folder(step)
        fill(storage, folder, files)
    else:
        manifest = record_of(step, attempt, prefix=f"{attempt}/", **record)
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
