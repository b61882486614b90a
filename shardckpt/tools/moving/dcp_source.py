"""A checkpoint that DCP's own writers made, as a source: whole tensors out of its chunks. One process."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from shardckpt.engine.consolidated.blocks import Block, common, position, stretch
from shardckpt.engine.dcp.foreign.folder import DcpFolder, SavedValue
from shardckpt.engine.dcp.foreign.locating import Located
from shardckpt.engine.loading.fetching.arena import Arena
from shardckpt.engine.loading.fetching.fetch import NO_SUM, Fetched, Need
from shardckpt.engine.loading.integrity import PartialSum, Region, join_sums
from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.foreign.dcp import METADATA, Payload, StoredChunk
from shardckpt.format.foreign.nesting import nest
from shardckpt.format.foreign.saved import is_alone, map_values, order_of
from shardckpt.format.index import ITEMSIZE, StoredBox, StoredRecord
from shardckpt.format.placement import Box
from shardckpt.format.restricted.foreign import StoredView
from shardckpt.storage.base import Storage
from shardckpt.storage.open import open_storage
from shardckpt.tools.moving.dcp_shards import are_shards, open_shards
from shardckpt.tools.moving.seam import TensorFacts, TensorName, Window

_PIECE = 16 << 20
"""Bytes that are read, checked and put in their place at a time, besides the windows."""


def is_dcp(names: Collection[str]) -> bool:
    """Whether a folder that holds these names is a checkpoint of DCP's own."""
    return METADATA in names or are_shards(names)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """The chunks of a tensor, and where they lie as far as that is known already."""

    facts: TensorFacts
    chunks: tuple[StoredChunk, ...]
    known: Mapping[Payload, Located]


class DcpSource:
    """A `TensorSource` over a folder with `.metadata`, at a path or URL, or in an opened storage.

    Or over one of `HuggingFaceStorageWriter(save_distributed=True)` that was not consolidated: safetensors of shards.

    Opening it reads the metadata and every value that is no tensor. Tensors inside of such values (in tuples, which DCP
    does not look into) come as tensors too, under the value's name and a number; a `BytesIO` comes as its bytes. Chunks
    are summed up by the CRCs of their archives as soon as all of their bytes have been read.

    `CheckpointNotFoundError`, `CheckpointDamagedError` (also for chunks that overlap or leave holes),
    `CheckpointLoadError` for values that need code to be loaded.

    Args:
        where: a path, a URL, or a storage that was opened and stays open.
        folder: of the checkpoint in that storage; "" is its root.
        storage_options: for a URL; never logged.
    """

    def __init__(
        self,
        where: str | os.PathLike[str] | Storage,
        *,
        folder: str = "",
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        opened = open_storage(where, storage_options=storage_options) if isinstance(where, (str, os.PathLike)) else None
        self._own, self._lock = opened, Lock()
        self._storage: Storage = opened if opened is not None else where  # type: ignore[assignment]
        self._tensors: dict[str, _Tensor] = {}
        self._ties: dict[str, str] = {}
        self._sums: dict[tuple[str, int], list[PartialSum]] = {}
        try:
            self._folder = _opened(self._storage, folder)
            self._tree = self._take_in()
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return {name: tensor.facts for name, tensor in self._tensors.items()}

    @property
    def ties(self) -> Mapping[str, str]:
        return self._ties

    @property
    def tree(self) -> Any:
        return self._tree

    def read(self, windows: Sequence[Window]) -> None:
        """Windows may begin and end at any byte."""
        pieces = [piece for window in windows for piece in _cut(window)]
        while pieces:
            group: list[Window] = []
            total = 0
            while pieces and (not group or total + len(pieces[0].into) <= _PIECE):
                group.append(pieces.pop(0))
                total += len(group[-1].into)
            self._read(group)

    def close(self) -> None:
        if self._own is not None:
            self._own.close()

    def _take_in(self) -> Any:
        entries, paths = self._folder.metadata.entries, self._folder.metadata.paths
        self._folder.check_whole(entries)
        values = dict(self._folder.values([name for name, entry in entries.items() if isinstance(entry, Payload)]))
        leaves: dict[str, Any] = {}
        homes: dict[Any, str] = {}
        for name, entry in entries.items():
            if isinstance(entry, Payload):
                leaves[name] = self._value(name, values[name])
                continue
            leaves[name] = TensorName(name)
            home = (entry.dtype, entry.shape, entry.chunks)
            if entry.chunks and homes.setdefault(home, name) != name:
                self._ties[name] = homes[home]
            else:
                self._tensors[name] = _Tensor(TensorFacts(entry.dtype, entry.shape), entry.chunks, {})
        try:
            return nest(leaves, paths)
        except ValueError as error:
            raise CheckpointDamagedError(f"{self._folder.url} is damaged: {error}") from error

    def _value(self, name: str, saved: SavedValue) -> Any:
        count = 0

        def take(place: StoredView) -> TensorName:
            nonlocal count
            own, count = f"{name}.{count}", count + 1
            if own in self._folder.metadata.entries or (place.nbytes and order_of(place) is None):
                raise CheckpointLoadError(
                    f"{self._folder.url}: {name} holds a tensor whose elements lie here and there in a larger one, or "
                    f"whose name would be {own}, which another has; load it with dcp.load"
                )
            at, _, crc = saved.records[place.key]
            at, order = at + place.offset * ITEMSIZE[place.dtype], order_of(place) or ()
            shape = tuple(place.shape[d] for d in order)
            record = StoredRecord(place.dtype, shape, at, place.nbytes, crc if is_alone(place) else NO_SUM)
            chunk = StoredChunk((0,) * len(place.shape), place.shape, Payload(saved.payload.file, at, place.nbytes))
            located = {chunk.payload: Located(saved.payload.file, record, order)}
            self._tensors[own] = _Tensor(
                TensorFacts(place.dtype, place.shape), (chunk,) if place.nbytes else (), located
            )
            return TensorName(own)

        tree = map_values(saved.tree, take)
        return tree.getvalue() if isinstance(tree, io.BytesIO) else tree

    def _read(self, windows: Sequence[Window]) -> None:
        parts = [part for window in windows for part in self._parts(window)]
        located = self._located(parts)
        arena = Arena(self._storage, self._folder.key)
        try:
            places = [_add(arena, part, located[part.chunk.payload]) for part in parts]
            with self._folder.told():
                damaged, partial = arena.read(())
            self._check(damaged, partial)
            arena.fill(places, timeout=None)
        finally:
            arena.release()

    def _located(self, parts: Sequence[_Part]) -> Mapping[Payload, Located]:
        known = {payload: place for part in parts for payload, place in part.tensor.known.items()}
        rest = {p.chunk.payload: (p.tensor.facts.dtype, p.chunk) for p in parts if p.chunk.payload not in known}
        return {**known, **self._folder.locate(rest)}

    def _parts(self, window: Window) -> Iterator[_Part]:
        tensor = self._tensors[self._ties.get(window.name, window.name)]
        if window.start < 0 or window.start + len(window.into) > tensor.facts.nbytes:
            raise ValueError(f"{window.name} has {tensor.facts.nbytes} bytes, and the window leaves them")
        size = ITEMSIZE[tensor.facts.dtype]
        shape = (*tensor.facts.shape, size)  # bytes are a dimension of their own: windows may cut elements
        flat = torch.frombuffer(window.into, dtype=torch.uint8)
        for block in stretch(shape, window.start, window.start + len(window.into)):
            first = position(shape, block.offsets) - window.start
            place = flat[first : first + block.numel].view(block.lengths)
            for chunk in tensor.chunks:
                whole = Block((*chunk.offsets, 0), (*chunk.lengths, size))
                shared = common(block, whole)
                if shared is not None:
                    yield _Part(window.name, tensor, chunk, shared.inside(whole), place[shared.inside(block).slices])

    def _check(self, damaged: Sequence[str], partial: Sequence[PartialSum]) -> None:
        """Chunks that are read piece by piece are checked with the last of them."""
        torn = list(damaged)
        with self._lock:
            for piece in partial:
                pieces = self._sums.setdefault((piece.file, piece.record), [])
                pieces.append(piece)
                if sum(one.nbytes for one in pieces) >= piece.record_nbytes:
                    torn += join_sums(pieces)[0]
                    del self._sums[piece.file, piece.record]
        if torn:
            files = ", ".join(dict.fromkeys(torn))
            raise CheckpointDamagedError(
                f"{self._folder.url} is damaged: bytes of tensors in {files} are not those that were written"
            )


@dataclass(frozen=True, slots=True)
class _Part:
    """What a window wants of a chunk: a block of it, with bytes as the last dimension, and where that goes."""

    name: str
    tensor: _Tensor
    chunk: StoredChunk
    block: Block
    place: torch.Tensor


def _opened(storage: Storage, folder: str) -> DcpFolder:
    try:
        return DcpFolder(storage, folder)
    except CheckpointNotFoundError:
        names = storage.list(folder)
        if not are_shards(names):
            raise
    return open_shards(storage, folder, names)


def _cut(window: Window) -> Iterator[Window]:
    for at in range(0, len(window.into), _PIECE):
        yield Window(window.name, window.start + at, window.into[at : at + _PIECE])


def _add(arena: Arena, part: _Part, located: Located) -> tuple[Fetched, torch.Tensor]:
    order = (*located.order, len(located.order))
    shape = (*located.record.shape, ITEMSIZE[located.record.dtype])
    record = StoredRecord("uint8", shape, located.record.at, located.record.nbytes, located.record.crc)
    start, lengths = (tuple(those[d] for d in order) for those in part.block)
    zeros = (0,) * len(shape)
    stored = StoredBox(part.name, located.record.at, shape, Box(zeros, shape, zeros))
    return arena.add(Need(located.file, stored, Region(start, lengths), (), 0), record), part.place.permute(order)
