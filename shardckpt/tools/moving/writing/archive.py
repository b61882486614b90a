"""A `.pt` file of tensors that a source gives, put by bounded pieces.

The layout follows from the tensors' sizes; the headers, which come before the data, hold their CRCs. So the source is
gone through twice: once for the sums, once for the bytes, which must then be the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shardckpt.engine.consolidated.assembling.assemble import assemble
from shardckpt.engine.consolidated.assembling.reading import Parts
from shardckpt.engine.consolidated.assembling.whole import Source, WholeTensor
from shardckpt.engine.consolidated.blocks import whole
from shardckpt.engine.saving.draft import take_value
from shardckpt.errors import CheckpointDamagedError, CheckpointError, InvalidStateError
from shardckpt.format.checksum import crc32
from shardckpt.format.index import StoredBox
from shardckpt.format.manifest import FileEntry
from shardckpt.format.placement import Box
from shardckpt.format.tree import TensorRef
from shardckpt.storage.base import Read, Storage
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.tools.moving.foreign.nesting import Path, flat_name
from shardckpt.tools.moving.seam import TensorFacts, TensorName, TensorSource, Window


@dataclass(slots=True)
class ArchiveFile:
    """What one file holds. Tensors by the names that the source has for them, each once."""

    tree: Any = field(default_factory=dict)
    """With what `take` has given."""
    own: dict[str, TensorFacts] = field(default_factory=dict)
    """The tensors that have bytes, by the source's names, in order."""
    names: dict[str, TensorFacts] = field(default_factory=dict)
    """All tensors, by the names that they have in the file."""
    values: dict[str, None] = field(default_factory=dict)
    boxes: list[StoredBox] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def take(self, path: Path, leaf: Any, *, facts: Mapping[str, TensorFacts], ties: Mapping[str, str]) -> Any:
        """What stands for the leaf in the file's tree."""
        name = flat_name(path)
        if name in self.names or name in self.values:
            raise InvalidStateError(f"two entries of the state are both called {name!r}; rename one of them")
        if not isinstance(leaf, TensorName):
            take_value(name, leaf)
            self.values[name] = None
            return leaf
        first = ties.get(leaf.name, leaf.name)
        number = self.numbers.setdefault(first, len(self.numbers))
        self.own[first] = self.names[name] = facts[first]
        shape, zeros = facts[first].shape, (0,) * len(facts[first].shape)
        self.boxes.append(StoredBox(name, number, shape, Box(zeros, shape, zeros)))
        return TensorRef(number, getattr(torch, facts[first].dtype), shape)

    def put(self, storage: Storage, key: str, source: TensorSource, *, budget: int) -> FileEntry:
        """Write it; its entry for a record. `CheckpointDamagedError` if the source changes meanwhile."""
        tensors = [
            WholeTensor(name, facts.dtype, facts.shape, crc, ())
            for (name, facts), crc in zip(self.own.items(), _sums(source, self.own, budget), strict=True)
        ]
        placed = [
            replace(tensor, sources=(Source(number, 0, whole(tensor.shape)),) if tensor.nbytes else ())
            for number, tensor in enumerate(tensors)
        ]
        names = list(self.own)
        reading = _Reading(storage, source)
        try:
            return assemble(
                Parts(reading, names.__getitem__, {}),
                key,
                tensors=tensors,
                sources=placed,
                tree=self.tree,
                boxes=self.boxes,
                most_nbytes=budget // 2,
            )
        except CheckpointDamagedError as error:
            if reading.failed:
                raise
            what = str(error).partition(" ")[0]
            raise CheckpointDamagedError(f"{what} was read twice, and was not the same: somebody changes it") from error


class _Reading(StorageWrapper):
    """A storage to be written to, from which the tensors of a source are read by name."""

    def __init__(self, inner: Storage, source: TensorSource) -> None:
        super().__init__(inner)
        self._source = source
        self.failed = False
        """Whether the source itself could not be read."""

    def read_into(self, reads: Sequence[Read]) -> None:
        try:
            self._source.read([Window(read.key, read.offset, read.into) for read in reads])
        except CheckpointError:
            self.failed = True
            raise


def _sums(source: TensorSource, tensors: Mapping[str, TensorFacts], budget: int) -> Iterable[int]:
    """The CRC of each tensor, in order; some megabytes of them are read at once."""
    memory = memoryview(bytearray(min(budget // 2, _SUMMED_AT_ONCE) // _ALIGNED * _ALIGNED))
    crcs = dict.fromkeys(tensors, 0)
    for batch in _batches(tensors, memory):
        source.read(batch)
        for window in batch:
            crcs[window.name] = crc32(window.into, crcs[window.name])
    return list(crcs.values())


_SUMMED_AT_ONCE = 32 << 20
_ALIGNED = 16
"""Bytes of the widest element: windows begin at such places, so that none cuts an element."""


def _batches(tensors: Mapping[str, TensorFacts], memory: memoryview) -> Iterator[list[Window]]:
    """All bytes of all tensors in windows that fill the memory, again and again."""
    batch: list[Window] = []
    used = 0
    for name, facts in tensors.items():
        start = 0
        while start < facts.nbytes:
            nbytes = min(facts.nbytes - start, len(memory) - used)
            batch.append(Window(name, start, memory[used : used + nbytes]))
            start, used = start + nbytes, used + nbytes
            if used == len(memory):
                yield batch
                batch, used = [], 0
        used += -used % _ALIGNED
        if used == len(memory):
            yield batch
            batch, used = [], 0
    if batch:
        yield batch
