"""A checkpoint of this package, as one rank of a `dcp.load` sees it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.planner import ReadItem

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.dcp.reading import Found
from shardckpt.engine.loading.contents import Contents
from shardckpt.engine.loading.fetching.borrow import fetch_from
from shardckpt.engine.loading.fetching.fetch import Fetch, Need, find_stored
from shardckpt.engine.loading.integrity import Region
from shardckpt.engine.loading.sources import BelongsToRankError, Chunk, Sources
from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError
from shardckpt.format.manifest import Manifest
from shardckpt.format.placement import Box
from shardckpt.storage import Storage


class OwnOrigin:
    """Made of its record; used once, in the thread of `dcp.load`."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest, at: Coordinates) -> None:
        self._storage = storage
        self._folder = folder
        self._manifest = manifest
        self._at = at
        self._sources = Sources(manifest, at)
        self._contents = Contents(storage, folder, manifest)
        self._chunks: dict[tuple[str, tuple[int, ...]], Chunk] = {}
        self._leaves: dict[int, Any] = {}

    @property
    def url(self) -> str:
        return f"{self._storage.url.rstrip('/')}/{self._folder}"

    @property
    def step(self) -> int:
        return self._manifest.step

    def dtype(self, name: str) -> str | None:
        entry = self._sources.tensor(name)
        return entry.dtype if entry is not None else None

    def open(self, tensors: Sequence[ReadItem], values: Sequence[ReadItem]) -> Fetch:
        indexed = {self._chunk(item)[0] for item in tensors}
        trees = {name for item in values for name in self._sources.trees_of(self._rank_of(item.storage_index.fqn))}
        self._contents.check_sizes(sorted(indexed | trees))
        self._contents.open(indexed, trees)
        return fetch_from(self._storage, self._contents.key_of, indexed)

    def find(self, item: ReadItem, position: int) -> Found:
        name, (file, box) = item.storage_index.fqn, self._chunk(item)
        stored = find_stored(self._contents.boxes(file), name, box, file)
        record = self._contents.record(file, stored)
        start = tuple(a + b for a, b in zip(item.storage_offsets, stored.box.local, strict=True))
        ends = [at + n for at, n in zip(item.storage_offsets, item.lengths, strict=True)]
        if record.dtype != self.dtype(name) or any(a > b for a, b in zip(ends, box.lengths, strict=True)):
            raise self._damaged(f"{file} and the record do not say the same of {name}")
        order = tuple(range(len(start)))
        return Found(Need(file, stored, Region(start, tuple(item.lengths)), (), position), record, order)

    def stream(self, key: str) -> io.BytesIO:
        rank = self._rank_of(key)
        if rank not in self._leaves:
            self._leaves[rank] = self._contents.leaves(self._sources.trees_of(rank))
        if key not in self._leaves[rank]:
            raise self._damaged(f"the file of rank {rank} does not hold {key}, which the record says it holds")
        stream = io.BytesIO()
        torch.save(self._leaves[rank][key][1], stream)
        stream.seek(0)
        return stream

    def _chunk(self, item: ReadItem) -> Chunk:
        """The file and the box that an item's storage index means: the box that begins there."""
        name, offset = item.storage_index.fqn, tuple(item.storage_index.offset or ())
        key = (name, offset)
        if key not in self._chunks:
            place = Box(offset, (1,) * len(offset), (0,) * len(offset))
            try:
                near = self._sources.chunks(name, "fail", parts=(place,))
            except BelongsToRankError as error:
                raise self._per_rank(name) from error
            found = next((chunk for chunk in near if chunk[1].offsets == offset), None)
            if found is None:
                raise CheckpointLoadError(f"{self.url}: {name} has no part that begins at {list(offset)}")
            self._chunks[key] = found
        return self._chunks[key]

    def _rank_of(self, key: str) -> int:
        """The rank, of those that saved, whose value this rank takes."""
        try:
            rank = self._sources.part_rank([key], "fail")
        except BelongsToRankError as error:
            raise self._per_rank(key) from error
        assert rank is not None
        return rank

    def _per_rank(self, key: str) -> CheckpointLoadError:
        return CheckpointLoadError(
            f"{self.url}: {key} was saved with a different value by each of {self._manifest.world_size} ranks, and "
            f"this job has {self._at.world_size}; leave it out, or load it with CheckpointManager.load and "
            "LoadPolicy(new_world=...)",
            step=self.step,
        )

    def _damaged(self, problem: str) -> CheckpointDamagedError:
        return CheckpointDamagedError(f"{self.url} is damaged: {problem}", step=self.step)
