"""Write any checkpoint as a committed step of ours, as one process would have saved it, by bounded pieces.

The layout of a file follows from the tensors' sizes; its headers, which come before the data, hold their CRCs. So the
source is gone through twice: once for the sums, once for the bytes, which must then be the same. The step is there when
its record is, as after every save.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch

from shardckpt.engine.committing.commit import abandon_attempt, attempt_prefix, begin_attempt, commit_attempt
from shardckpt.engine.committing.receipts import compose_manifest, merge_tables
from shardckpt.engine.consolidated.assembling.assemble import assemble
from shardckpt.engine.consolidated.assembling.reading import Parts
from shardckpt.engine.consolidated.assembling.whole import Source, WholeTensor
from shardckpt.engine.consolidated.blocks import whole
from shardckpt.engine.consolidated.fragments import WINDOW
from shardckpt.engine.saving.draft import take_value
from shardckpt.engine.saving.write import Receipt
from shardckpt.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    CommitUnknownError,
    InvalidStateError,
)
from shardckpt.format.checksum import crc32
from shardckpt.format.index import StoredBox
from shardckpt.format.layout import MODEL_KEY, new_attempt, step_folder
from shardckpt.format.manifest import FileEntry, Home, LayoutEntry, Table, TensorEntry
from shardckpt.format.placement import Box
from shardckpt.format.record.homes import home_file
from shardckpt.format.tree import TensorRef
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import Read, Storage
from shardckpt.storage.open import open_storage
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.tools.moving.foreign.nesting import Path, flat_name, walk
from shardckpt.tools.moving.seam import TensorFacts, TensorName, TensorSource, Window
from shardckpt.tools.place import Where

_LEAST_BUDGET = 4 * WINDOW
"""Bytes: no less is of use."""
_HOMES: tuple[Home, ...] = ("model", "rank")


class StepSink:
    """A step of a run, written once. `CheckpointManager(...).resume` of any world size loads it."""

    def __init__(
        self,
        where: Where,
        *,
        step: int,
        metadata: Mapping[str, Any] | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """`where`: the run; a path, URL or `Storage`. `metadata`: the step's own, as `save` takes it."""
        step_folder(step)
        self._where, self._options = where, storage_options
        self._step = step
        self._metadata = dict(metadata or {})

    def write(self, source: TensorSource, *, budget_nbytes: int) -> None:
        """Write it and commit. The state has parts; that of the model is called "model".

        `CheckpointSaveError` if the step is there already or the storage does not take it, `InvalidStateError` for what
        no checkpoint can hold, what the source raises for what it cannot read. Then there is no such step.
        """
        where, own = self._where, isinstance(self._where, (str, os.PathLike))
        storage = open_storage(where, storage_options=self._options) if isinstance(where, (str, os.PathLike)) else where
        try:
            self._write(storage, source, max(budget_nbytes, _LEAST_BUDGET))
        except OSError as error:
            raise CheckpointSaveError(f"step {self._step} was not written: {error}", step=self._step) from error
        finally:
            if own:
                storage.close()

    def _write(self, storage: Storage, source: TensorSource, budget: int) -> None:
        with contextlib.suppress(CheckpointNotFoundError):
            Catalog(storage).entry(self._step)
            raise CheckpointSaveError(
                f"step {self._step} is in {storage.url} already: name another, or delete it first", step=self._step
            )
        files = _plan(source)
        attempt = new_attempt()
        prefix = attempt_prefix(storage, self._step, attempt)
        try:
            known = begin_attempt(storage, prefix)
            began = time.perf_counter()
            entries = [file.put(storage, prefix, source, budget) for file in files]
            manifest = self._manifest(attempt, files, entries, {"write": time.perf_counter() - began})
            commit_attempt(storage, prefix, manifest, known=known)
        except CommitUnknownError:
            raise
        except BaseException:
            abandon_attempt(storage, prefix)
            raise

    def _manifest(
        self, attempt: str, files: Sequence[_File], entries: Sequence[FileEntry], seconds: Mapping[str, float]
    ) -> Any:
        tensors = {
            name: TensorEntry(facts.dtype, facts.shape, number)
            for number, file in enumerate(files)
            for name, facts in file.names.items()
        }
        values: dict[str, Home] = {name: file.home for file in files for name in file.values}
        layouts = [LayoutEntry(file.home) for file in files]
        wrote = {entry.name: (0, entry.nbytes) for entry in entries}
        receipt = Receipt(0, 0, tuple(entries), seconds=seconds, wrote=wrote)
        tables = merge_tables([([], layouts, Table((0,), tensors, values))])
        created = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        return compose_manifest(self._step, attempt, created, [receipt], tables, self._metadata)


@dataclass(slots=True)
class _File:
    """What one file of the step holds. Tensors by the names that the source has for them, each once."""

    home: Home
    tree: dict[str, Any] = field(default_factory=dict)
    own: dict[str, TensorFacts] = field(default_factory=dict)
    """The tensors that have bytes, by the source's names, in order."""
    names: dict[str, TensorFacts] = field(default_factory=dict)
    """All tensors, by the step's names."""
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

    def put(self, storage: Storage, prefix: str, source: TensorSource, budget: int) -> FileEntry:
        """Write it below the prefix; its entry for the record."""
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
            entry = assemble(
                Parts(reading, names.__getitem__, {}),
                f"{prefix}/{home_file(self.home, 0, 0, 1)}",
                tensors=tensors,
                sources=placed,
                tree=self.tree | ({MODEL_KEY: "model"} if self.home == "model" else {}),
                boxes=self.boxes,
                most_nbytes=budget // 2,
            )
        except CheckpointDamagedError as error:
            if reading.failed:
                raise
            what = str(error).partition(" ")[0]
            raise CheckpointDamagedError(f"{what} was read twice, and was not the same: somebody changes it") from error
        return replace(entry, kind=self.home)


def _plan(source: TensorSource) -> list[_File]:
    """Which file holds what. `InvalidStateError` for a state that no checkpoint can hold."""
    tree, facts, ties = source.tree, source.tensors, source.ties
    if not isinstance(tree, Mapping) or not tree or not all(isinstance(key, str) for key in tree):
        raise InvalidStateError("a state has parts by name, such as model and optimizer; this one has none")
    if MODEL_KEY in tree:
        raise InvalidStateError(f"{MODEL_KEY!r} is what the files call the model's entry; no part can have that name")
    files = {home: _File(home) for home in _HOMES}
    for part, below in tree.items():
        file = files["model" if part == "model" else "rank"]
        file.tree[part] = walk(below, TensorName, partial(file.take, facts=facts, ties=ties), (part,))
    return [file for file in files.values() if file.tree]


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
    memory = memoryview(bytearray(min(budget // 2, _SUMMED_AT_ONCE)))
    crcs = dict.fromkeys(tensors, 0)
    for batch in _batches(tensors, memory):
        source.read(batch)
        for window in batch:
            crcs[window.name] = crc32(window.into, crcs[window.name])
    return list(crcs.values())


_SUMMED_AT_ONCE = 32 << 20


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
    if batch:
        yield batch
