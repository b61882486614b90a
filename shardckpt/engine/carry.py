"""What a checkpoint carries beside the state: copies of `<root>/cc/**`, and metadata of the user's as an archive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.dcp.image import seal_in_place
from shardckpt.engine.saving.draft import Draft, record_number
from shardckpt.engine.saving.plan import FilePlan
from shardckpt.engine.sharding import check_tensor
from shardckpt.errors import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointSaveError,
    InvalidStateError,
)
from shardckpt.format.checksum import crc32
from shardckpt.format.index import StoredBox, decode_index
from shardckpt.format.layout import CARBON_COPY, MANIFEST, METADATA, METRICS, SCORE, check_file_name, metadata_file
from shardckpt.format.manifest import FileEntry, Manifest
from shardckpt.format.placement import Box
from shardckpt.format.reduced import may_be_doomed
from shardckpt.format.tree import TensorRef, UnsafeValueError, check_value, decode_tree, map_leaves, spell_tree
from shardckpt.state import Path, join_path
from shardckpt.storage.base import Read, Storage

_WINDOW = 4 << 20
"""Bytes of a carried file in memory at once, more or less."""


def carry(storage: Storage, prefix: str) -> list[FileEntry]:
    """Copy what lies in `cc/` into the attempt. On rank 0, on the save thread.

    `CheckpointSaveError` for a file with a name that the engine uses itself. The files are read anew each time.
    """
    return [_copy(storage, prefix, name) for name in _below(storage, "")]


def _below(storage: Storage, folder: str) -> Iterator[str]:
    """Names of all files in `cc/`, relative to it."""
    for name in storage.list(f"{CARBON_COPY}/{folder}".rstrip("/")):
        if name.endswith("/"):
            yield from _below(storage, folder + name)
        else:
            yield folder + name


def _copy(storage: Storage, prefix: str, name: str) -> FileEntry:
    try:
        check_file_name(name)
    except ValueError as error:
        raise CheckpointSaveError(f"{CARBON_COPY}/{name} cannot be copied into a checkpoint: {error}") from error
    if may_be_doomed(name) or name in (MANIFEST, SCORE, METRICS):
        raise CheckpointSaveError(
            f"{CARBON_COPY}/{name} has a name that each checkpoint uses itself; give the file another name"
        )
    source, crc = f"{CARBON_COPY}/{name}", 0
    nbytes = storage.size(source)

    def blocks() -> Iterator[memoryview]:
        nonlocal crc
        crc = 0
        for start in range(0, nbytes, _WINDOW):
            block = memoryview(bytearray(min(_WINDOW, nbytes - start)))
            storage.read_into([Read(source, start, block)])
            crc = crc32(block, crc)
            yield block

    storage.put(f"{prefix}/{name}", blocks())
    return FileEntry(name, nbytes, crc, CARBON_COPY, 0)


def put_metadata(storage: Storage, prefix: str, metadata: Mapping[str, Any], *, name: str, writer: int) -> FileEntry:
    """Write a mapping of values and tensors as an archive of its own. `InvalidStateError` for what cannot be stored."""
    draft = Draft()
    try:
        tree = map_leaves(dict(metadata), lambda path, leaf: _leaf(draft, path, leaf))
    except UnsafeValueError as error:
        raise InvalidStateError(f"metadata: {error}") from error
    plan = FilePlan(name, "replicated", tuple(draft.records), tuple(draft.boxes), spell_tree(tree))
    sealed = seal_in_place(plan, rank=writer)
    storage.put(f"{prefix}/{name}", sealed.parts)
    at = sealed.entry
    return FileEntry(name, at.nbytes, at.crc, METADATA, writer, at.index, at.tree)


def _leaf(draft: Draft, path: Path, leaf: Any) -> Any:
    name = join_path(path)
    if not isinstance(leaf, torch.Tensor):
        try:
            check_value(leaf)
        except UnsafeValueError as error:
            raise InvalidStateError(f"metadata: {name}: {error}") from error
        return leaf
    dtype, shape, zeros = check_tensor(name, leaf), tuple(leaf.shape), (0,) * leaf.ndim
    if hasattr(leaf, "full_tensor"):
        raise InvalidStateError(f"metadata: {name} is sharded; put it into the state, or store its full_tensor()")
    number = record_number(draft, leaf, dtype)
    draft.boxes.append(StoredBox(name, number, shape, Box(zeros, shape, zeros)))
    return TensorRef(number, leaf.dtype, shape)


def metadata_entry(manifest: Manifest, at: Coordinates) -> FileEntry | None:
    """The file of this rank's shard; `CheckpointMismatchError` where other shards have one and this one has none."""
    stored = {file.name.rpartition("/")[2]: file for file in manifest.files if file.kind == METADATA}
    own = metadata_file(at.shard, at.shards)
    if not stored or own in stored:
        return stored.get(own)
    raise CheckpointMismatchError(
        f"the metadata of step {manifest.step} was saved for {manifest.shards} model shards, and this job has "
        f"{at.shards}: read it with as many, or from the files ({', '.join(sorted(stored))})",
        step=manifest.step,
    )


def read_metadata(storage: Storage, folder: str, entry: FileEntry, *, step: int) -> Any:
    """The mapping again, checked. `CheckpointDamagedError` if the file is not what was written."""
    where = f"{folder}/{entry.name}"
    try:
        content = storage.read(where)
    except FileNotFoundError as error:
        raise CheckpointDamagedError(f"{where} in {storage.url} is missing", step=step) from error
    if len(content) != entry.nbytes or crc32(content) != entry.crc or entry.index is None or entry.tree is None:
        raise CheckpointDamagedError(f"{where} in {storage.url} is damaged: its bytes are not those written", step=step)
    index_at, index_nbytes, _ = entry.index
    tree_at, tree_nbytes, _ = entry.tree
    try:
        index = decode_index(content[index_at : index_at + index_nbytes], entry.nbytes)
        tree = decode_tree(content[tree_at : tree_at + tree_nbytes])
        places = {box.name: index.records[box.record] for box in index.boxes}
        return map_leaves(tree, lambda path, leaf: _filled(leaf, places.get(join_path(path)), content))
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointDamagedError(f"{where} in {storage.url} is damaged: {error}", step=step) from error


def _filled(leaf: Any, record: Any, content: bytes) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if record is None or (str(leaf.dtype), leaf.shape) != (f"torch.{record.dtype}", record.shape):
        raise ValueError("a tensor is not in the index, or there as another one")
    own = bytearray(content[record.at : record.at + record.nbytes])
    if not own:
        return torch.empty(leaf.shape, dtype=leaf.dtype)
    return torch.frombuffer(own, dtype=torch.uint8).view(leaf.dtype).view(leaf.shape)
