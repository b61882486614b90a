"""Read what DCP's read items ask for: all ranges at once, checked, and only then handed to the planner."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem
from torch.distributed.tensor import DTensor

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.loading.contents import Contents
from shardckpt.engine.loading.fetching.borrow import fetch_from
from shardckpt.engine.loading.fetching.fetch import Arena, Fetch, Fetched, Need, find_stored
from shardckpt.engine.loading.integrity import Region, join_sums
from shardckpt.engine.loading.sources import BelongsToRankError, Chunk, Sources
from shardckpt.engine.sharding import describe
from shardckpt.errors import CheckpointDamagedError, CheckpointError, CheckpointLoadError, CheckpointMismatchError
from shardckpt.format.manifest import Manifest
from shardckpt.storage import Storage

_log = logging.getLogger(__name__)


class Reading:
    """One rank's part of a `dcp.load`. Used once, in the thread of that call."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest, at: Coordinates, *, cast: bool) -> None:
        self._storage = storage
        self._folder = folder
        self._manifest = manifest
        self._at = at
        self._cast = cast
        self._sources = Sources(manifest, at)
        self._contents = Contents(storage, folder, manifest)
        self._fetch: Fetch = Arena(storage, self._contents.key_of)
        self._chunks: dict[str, dict[tuple[int, ...], Chunk]] = {}
        self._leaves: dict[int, Any] = {}

    @property
    def url(self) -> str:
        return f"{self._storage.url.rstrip('/')}/{self._folder}"

    def run(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        """Fill the planner's tensors and values. If it raises, nothing on this rank has been changed."""
        asked = [item for item in items if item.type == LoadItemType.TENSOR]
        tensors = [(item, planner.resolve_tensor(item).detach()) for item in asked]
        values = [item for item in items if item.type == LoadItemType.BYTE_IO]
        try:
            with told_as_load_errors(self.url, self._manifest.step):
                _check_placements(getattr(planner, "state_dict", None))
                self._check_fit(tensors)
                fetched = self._read(tensors, values)
                streams = [self._stream(item.storage_index.fqn) for item in values]
            found = [(item, target) for item, (_, target) in zip(fetched, tensors, strict=True) if item is not None]
            self._fetch.fill(found, timeout=None)
            for item, target in tensors:
                planner.commit_tensor(item, target)
            for item, stream in zip(values, streams, strict=True):
                planner.load_bytes(item, stream)
        finally:
            self._fetch.release()

    def _check_fit(self, tensors: Sequence[tuple[ReadItem, torch.Tensor]]) -> None:
        """All differences at once; DCP itself would convert without a word."""
        problems = []
        for item, target in tensors:
            name = item.storage_index.fqn
            entry = self._sources.tensor(name)
            if entry is None:
                problems.append(f"kind: {name} is no tensor in the checkpoint")
            elif target.shape != item.lengths:
                problems.append(f"shape: {name}: {list(item.lengths)} are to be read into {list(target.shape)}")
            elif entry.dtype != str(target.dtype).removeprefix("torch.") and not self._cast:
                problems.append(f"dtype: {name} is {entry.dtype} in the checkpoint, {target.dtype} in the state")
        if problems:
            listed = "".join(f"\n  - {problem}" for problem in dict.fromkeys(problems))
            raise CheckpointMismatchError(
                f"{self.url} does not fit the state, and nothing was loaded:{listed}\n"
                "Change the state or, to convert from one dtype to another, DcpReader(..., dtype='cast')",
                problems=list(dict.fromkeys(problems)),
                step=self._manifest.step,
            )

    def _read(
        self, tensors: Sequence[tuple[ReadItem, torch.Tensor]], values: Sequence[ReadItem]
    ) -> list[Fetched | None]:
        """The bytes of every item, in memory and checked as far as one rank can; None for an item without elements."""
        chunks = [self._chunk(item) for item, _ in tensors]
        trees = {name for item in values for name in self._sources.trees_of(self._rank_of(item.storage_index.fqn))}
        indexed = {file for file, _ in chunks}
        self._contents.check_sizes(sorted(indexed | trees))
        self._contents.open(indexed, trees)
        self._fetch = fetch_from(self._storage, self._contents.key_of, indexed)
        fetched = [
            self._add(position, item, chunk) if all(item.lengths) else None
            for position, ((item, _), chunk) in enumerate(zip(tensors, chunks, strict=True))
        ]
        damaged, partial = self._fetch.read(())
        torn, unchecked = join_sums(partial)
        if damaged or torn:
            names = ", ".join(sorted({*damaged, *torn}))
            raise self._damaged(f"the bytes of {names} are not those that were written; nothing was loaded")
        if unchecked:
            _log.info("%d bytes of %s were read in part and could not be checked against a digest", unchecked, self.url)
        return fetched

    def _add(self, position: int, item: ReadItem, chunk: Chunk) -> Fetched:
        name, (file, box) = item.storage_index.fqn, chunk
        stored = find_stored(self._contents.boxes(file), name, box, file)
        record, entry = self._contents.record(file, stored), self._sources.tensor(name)
        start = tuple(a + b for a, b in zip(item.storage_offsets, stored.box.local, strict=True))
        ends = [at + n for at, n in zip(item.storage_offsets, item.lengths, strict=True)]
        if entry is None or record.dtype != entry.dtype or any(a > b for a, b in zip(ends, box.lengths, strict=True)):
            raise self._damaged(f"{file} and the record do not say the same of {name}")
        return self._fetch.add(Need(file, stored, Region(start, tuple(item.lengths)), (), position), record)

    def _chunk(self, item: ReadItem) -> Chunk:
        """The file and the box that an item's storage index means."""
        name, offset = item.storage_index.fqn, item.storage_index.offset
        if name not in self._chunks:
            try:
                self._chunks[name] = {box.offsets: (file, box) for file, box in self._sources.chunks(name, "fail")}
            except BelongsToRankError as error:
                raise self._per_rank(name) from error
        try:
            return self._chunks[name][tuple(offset or ())]
        except KeyError:
            raise CheckpointLoadError(f"{self.url}: {name} has no part that begins at {offset}") from None

    def _rank_of(self, key: str) -> int:
        """The rank, of those that saved, whose value this rank takes."""
        try:
            rank = self._sources.part_rank([key], "fail")
        except BelongsToRankError as error:
            raise self._per_rank(key) from error
        assert rank is not None
        return rank

    def _stream(self, key: str) -> io.BytesIO:
        """The value as a planner expects it: what `torch.save` writes."""
        rank = self._rank_of(key)
        if rank not in self._leaves:
            self._leaves[rank] = self._contents.leaves(self._sources.trees_of(rank))
        if key not in self._leaves[rank]:
            raise self._damaged(f"the file of rank {rank} does not hold {key}, which the record says it holds")
        stream = io.BytesIO()
        torch.save(self._leaves[rank][key][1], stream)
        stream.seek(0)
        return stream

    def _per_rank(self, key: str) -> CheckpointLoadError:
        return CheckpointLoadError(
            f"{self.url}: {key} was saved with a different value by each of {self._manifest.world_size} ranks, and "
            f"this job has {self._at.world_size}; leave it out, or load it with CheckpointManager.load and "
            "LoadPolicy(new_world=...)",
            step=self._manifest.step,
        )

    def _damaged(self, problem: str) -> CheckpointDamagedError:
        return CheckpointDamagedError(f"{self.url} is damaged: {problem}", step=self._manifest.step)


@contextmanager
def told_as_load_errors(url: str, step: int) -> Iterator[None]:
    """What goes wrong while the files of a checkpoint are read, as `CheckpointLoadError` or its "damaged"."""
    try:
        yield
    except CheckpointError:
        raise
    except (FileNotFoundError, EOFError) as error:
        raise CheckpointDamagedError(f"{url} is damaged: {error}", step=step) from error
    except (OSError, ValueError) as error:
        raise CheckpointLoadError(f"{url} was not loaded: {error}", step=step) from error


def _check_placements(state: Any) -> None:
    """Refuse DTensors that DCP takes for another part of the whole: it would load the wrong rows, and say nothing.

    2026-11, torch 2.13: where a `_StridedShard` leaves several separate ranges, DCP sees one of their joint size.
    """
    for name, tensor in state.items() if isinstance(state, Mapping) else ():
        if not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is None:
            continue
        sharding = describe(name, tensor)
        assert sharding is not None
        held = [
            ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.lengths)) for b in sharding.boxes(tensor.shape)
        ]
        if held != [chunk for chunk in tensor.__create_chunk_list__() if all(chunk.sizes)]:
            raise CheckpointLoadError(
                f"{name}: DCP does not understand its placement {list(sharding.placements)} of shape "
                f"{list(tensor.shape)}, and would load the wrong part; redistribute it, or use CheckpointManager.load"
            )
