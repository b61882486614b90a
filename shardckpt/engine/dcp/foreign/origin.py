"""A checkpoint of DCP's own, as one rank of a `dcp.load` sees it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from shardckpt.engine.dcp.foreign.folder import DcpFolder
from shardckpt.engine.dcp.reading import Found
from shardckpt.engine.loading.fetching.arena import Arena
from shardckpt.engine.loading.fetching.fetch import Fetch, Need
from shardckpt.engine.loading.integrity import Region
from shardckpt.errors import CheckpointLoadError
from shardckpt.format.foreign.dcp import Payload, StoredChunk, StoredTensor
from shardckpt.format.index import StoredBox
from shardckpt.format.placement import Box
from shardckpt.storage import Storage


class ForeignOrigin:
    """Used once, in the thread of `dcp.load`. What a rank needs is read into memory, checked, and then copied.

    (Not looked at where it lies, as files of ours are: there tensors begin at any byte.)
    """

    step = None

    def __init__(self, storage: Storage, folder: DcpFolder) -> None:
        self._storage = storage
        self._folder = folder
        self._entries = folder.metadata.entries
        self._chunks: dict[str, dict[tuple[int, ...], StoredChunk]] = {}
        self._values: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return self._folder.url

    def dtype(self, name: str) -> str | None:
        entry = self._entries.get(name)
        return entry.dtype if isinstance(entry, StoredTensor) else None

    def open(self, tensors: Sequence[ReadItem], values: Sequence[ReadItem]) -> Fetch:
        self._folder.check_whole(dict.fromkeys(item.storage_index.fqn for item in tensors))
        chunks = [
            (self.dtype(item.storage_index.fqn) or "", self._chunk(item)) for item in tensors if all(item.lengths)
        ]
        self._folder.locate({chunk.payload: (dtype, chunk) for dtype, chunk in chunks})
        names = [item.storage_index.fqn for item in values]
        wrong = [name for name in names if not isinstance(self._entries.get(name), Payload)]
        if wrong:
            raise CheckpointLoadError(f"{self.url}: {wrong[0]} is a tensor in the checkpoint, and none in the state")
        self._values = dict(self._folder.live_values(dict.fromkeys(names)))
        return Arena(self._storage, self._folder.key)

    def find(self, item: ReadItem, position: int) -> Found:
        name, chunk = item.storage_index.fqn, self._chunk(item)
        located = self._folder.locate({chunk.payload: (self.dtype(name) or "", chunk)})[chunk.payload]
        ends = [at + n for at, n in zip(item.storage_offsets, item.lengths, strict=True)]
        if located.record.dtype != self.dtype(name) or any(a > b for a, b in zip(ends, chunk.lengths, strict=True)):
            raise CheckpointLoadError(f"{self.url}: {name} has no such part as the planner asks for")
        start, lengths = (tuple(those[d] for d in located.order) for those in (item.storage_offsets, item.lengths))
        shape, zeros = located.record.shape, (0,) * len(chunk.lengths)
        stored = StoredBox(name, chunk.payload.at, shape, Box(zeros, shape, zeros))
        return Found(Need(located.file, stored, Region(start, lengths), (), position), located.record, located.order)

    def stream(self, key: str) -> io.BytesIO:
        """Saved anew: what lies in the file has been read by an allow-list, and is not given to `torch.load` itself."""
        stream = io.BytesIO()
        torch.save(self._values[key], stream)
        stream.seek(0)
        return stream

    def _chunk(self, item: ReadItem) -> StoredChunk:
        name, offset = item.storage_index.fqn, item.storage_index.offset
        if name not in self._chunks:
            entry = self._entries.get(name)
            self._chunks[name] = {c.offsets: c for c in entry.chunks} if isinstance(entry, StoredTensor) else {}
        try:
            return self._chunks[name][tuple(offset or ())]
        except KeyError:
            raise CheckpointLoadError(f"{self.url}: {name} has no part that begins at {offset}") from None


def metadata_of(folder: DcpFolder) -> Metadata:
    """What DCP is told: the same that the file says, made anew."""
    entries: dict[str, STORAGE_TYPES] = {}
    for name, entry in folder.metadata.entries.items():
        if isinstance(entry, Payload):
            entries[name] = BytesStorageMetadata()
            continue
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.lengths)) for c in entry.chunks]
        properties = TensorProperties(dtype=getattr(torch, entry.dtype))
        entries[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
    meta = StorageMeta(checkpoint_id=folder.url)
    return Metadata(entries, planner_data=dict(folder.metadata.paths), storage_meta=meta)
