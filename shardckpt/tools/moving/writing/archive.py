"""A `.pt` file of tensors that a source gives.

The layout follows from the tensors' sizes; the headers, which come before the data, hold their CRCs. Tensors of which
the source does not know them are gone through twice: once for the sums, once for the bytes, which must be the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch

from shardckpt.engine.saving.draft import take_value
from shardckpt.errors import InvalidStateError
from shardckpt.format.archive import Tail, front_of, header_of, lay_out, make_tail
from shardckpt.format.checksum import combine, crc32
from shardckpt.format.index import StoredBox, StoredRecord, encode_index
from shardckpt.format.manifest import FileEntry
from shardckpt.format.placement import Box
from shardckpt.format.tree import TensorRef, encode_tree
from shardckpt.storage.base import Storage
from shardckpt.tools.exporting.summing import checked, crcs_of, sums_of, unsummed
from shardckpt.tools.moving.foreign.nesting import Path, flat_name
from shardckpt.tools.moving.seam import TensorFacts, TensorName, TensorSource
from shardckpt.tools.moving.writing.stream import FileContent, Segment


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

    def content(self, name: str, crcs: Mapping[str, int]) -> tuple[FileContent, Tail]:
        """The file as it will be, with these CRCs of its tensors; its layout does not depend on them."""
        layout = lay_out([facts.nbytes for facts in self.own.values()])
        sums = [crcs[own] for own in self.own]
        rows = list(zip(layout.slots, self.own.items(), sums, strict=True))
        records = [
            StoredRecord(facts.dtype, facts.shape, slot.data, slot.nbytes, crc) for slot, (_, facts), crc in rows
        ]
        tail = make_tail(layout, sums, encode_index(records, self.boxes), encode_tree(self.tree))
        segments: list[Segment] = [front_of(layout)]
        for slot, (own, facts), crc in rows:
            segments += [header_of(slot, crc), (own, facts.nbytes)]
        return FileContent(name, [*segments, tail.content]), tail

    def put(self, storage: Storage, key: str, source: TensorSource, *, budget: int) -> FileEntry:
        """Write it; its entry for a record. `CheckpointDamagedError` if the source changes meanwhile."""
        twice = unsummed(source, self.own)
        extents = ((name, 0, facts.nbytes) for name, facts in twice.items())
        before = sums_of(source, extents, budget_nbytes=budget)
        crcs = crcs_of(source, self.own, before)
        content, tail = self.content(key.rpartition("/")[2], crcs)
        with closing(checked(source, content.segments, before, budget_nbytes=budget)) as parts:
            nbytes = storage.put(key, parts)
        crc, counted = combine(
            (crc32(segment), len(segment)) if isinstance(segment, bytes) else (crcs[segment[0]], segment[1])
            for segment in content.segments
        )
        assert nbytes == counted, f"{key}: {nbytes} bytes were put of {counted}"
        return FileEntry(content.name, nbytes, crc, "consolidated", 0, tail.index, tail.tree)
