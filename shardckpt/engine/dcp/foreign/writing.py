"""What DCP's own reader reads: archives of `torch.save`, one after the other, and the `.metadata` that finds them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from shardckpt.format.archive import front_of, header_of, lay_out, make_tail
from shardckpt.format.checksum import crc32
from shardckpt.format.foreign.dcp import DcpMetadata, Payload
from shardckpt.format.index import StoredBox, StoredRecord, encode_index
from shardckpt.format.placement import Box
from shardckpt.format.tree import encode_tree

_PROTOCOL = 4  # of the pickle, as DCP's own; the default of Python 3.14 is not known to older ones


@dataclass(frozen=True, slots=True)
class Content:
    """A tensor that goes into an archive: its bytes lie row by row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def archive_of(tree: Any, contents: Sequence[Content] = ()) -> list[memoryview]:
    """The parts of an archive that `torch.load` reads as `tree`, whose `TensorRef`s are numbers in `contents`.

    They look at the bytes of the contents, which must not change until they are written. `ValueError` and what `pickle`
    raises, for a tree that cannot be stored.
    """
    layout = lay_out([len(content.data) for content in contents])
    crcs = [crc32(content.data) for content in contents]
    parts = [memoryview(front_of(layout))]
    records, boxes = [], []
    for number, (slot, content, crc) in enumerate(zip(layout.slots, contents, crcs, strict=True)):
        parts += [memoryview(header_of(slot, crc)), content.data]
        records.append(StoredRecord(content.dtype, content.shape, slot.data, slot.nbytes, crc))
        zeros = (0,) * len(content.shape)
        boxes.append(StoredBox(content.name, number, content.shape, Box(zeros, content.shape, zeros)))
    tail = make_tail(layout, crcs, encode_index(records, boxes), encode_tree(tree))
    return [*parts, memoryview(tail.content)]


def encode_dcp_metadata(content: DcpMetadata, *, checkpoint_id: str) -> bytes:
    """The `.metadata`, as this version of torch writes it."""
    entries: dict[str, STORAGE_TYPES] = {}
    places: dict[MetadataIndex, Any] = {}
    for name, entry in content.entries.items():
        if isinstance(entry, Payload):
            entries[name] = BytesStorageMetadata()
            places[MetadataIndex(name)] = _info(entry)
            continue
        boxes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.lengths)) for c in entry.chunks]
        properties = TensorProperties(dtype=getattr(torch, entry.dtype))
        entries[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), boxes)
        for number, chunk in enumerate(entry.chunks):
            places[MetadataIndex(name, chunk.offsets, number)] = _info(chunk.payload)
    metadata = Metadata(entries, dict(content.paths), places, StorageMeta(checkpoint_id=checkpoint_id))
    if hasattr(filesystem, "CURRENT_DCP_VERSION"):  # torch 2.9 and later
        metadata.version = filesystem.CURRENT_DCP_VERSION
    return pickle.dumps(metadata, protocol=_PROTOCOL)


def _info(payload: Payload) -> Any:
    return filesystem._StorageInfo(payload.file, payload.at, payload.nbytes)
