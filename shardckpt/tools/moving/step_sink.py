"""Write any checkpoint as a committed step of ours, as one process would have saved it, by bounded pieces.

The layout of a file follows from the tensors' sizes; its headers, which come before the data, hold their CRCs. So the
source is gone through twice: once for the sums, once for the bytes, which must then be the same. The step is there when
its record is, as after every save.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

from shardckpt.engine.committing.commit import abandon_attempt, attempt_prefix, begin_attempt, commit_attempt
from shardckpt.engine.committing.receipts import compose_manifest, merge_tables
from shardckpt.engine.saving.write import Receipt
from shardckpt.errors import (
    CheckpointNotFoundError,
    CheckpointSaveError,
    CommitUnknownError,
    InvalidStateError,
)
from shardckpt.format.layout import MODEL_KEY, new_attempt, step_folder
from shardckpt.format.manifest import FileEntry, Home, LayoutEntry, Table, TensorEntry
from shardckpt.format.record.homes import home_file
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import Storage
from shardckpt.storage.open import open_storage, options_for
from shardckpt.tools.moving.foreign.nesting import walk
from shardckpt.tools.moving.seam import TensorName, TensorSource
from shardckpt.tools.moving.writing.archive import ArchiveFile
from shardckpt.tools.moving.writing.stream import LEAST_BUDGET
from shardckpt.tools.place import Where

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
        storage = where if not isinstance(where, (str, os.PathLike)) else _opened(where, self._options)
        try:
            self._write(storage, source, max(budget_nbytes, LEAST_BUDGET))
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
            entries = [_put(storage, prefix, home, file, source, budget) for home, file in files.items()]
            manifest = self._manifest(attempt, files, entries, {"write": time.perf_counter() - began})
            commit_attempt(storage, prefix, manifest, known=known)
        except CommitUnknownError:
            raise
        except BaseException:
            abandon_attempt(storage, prefix)
            raise

    def _manifest(
        self,
        attempt: str,
        files: Mapping[Home, ArchiveFile],
        entries: Sequence[FileEntry],
        seconds: Mapping[str, float],
    ) -> Any:
        tensors = {
            name: TensorEntry(facts.dtype, facts.shape, number)
            for number, file in enumerate(files.values())
            for name, facts in file.names.items()
        }
        values: dict[str, Home] = {name: home for home, file in files.items() for name in file.values}
        layouts = [LayoutEntry(home) for home in files]
        wrote = {entry.name: (0, entry.nbytes) for entry in entries}
        receipt = Receipt(0, 0, tuple(entries), seconds=seconds, wrote=wrote)
        tables = merge_tables([([], layouts, Table((0,), tensors, values))])
        created = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        return compose_manifest(self._step, attempt, created, [receipt], tables, self._metadata)


def _opened(where: str | os.PathLike[str], options: Mapping[str, object] | None) -> Storage:
    return open_storage(where, storage_options=options_for(where, options))


def _put(storage: Storage, prefix: str, home: Home, file: ArchiveFile, source: TensorSource, budget: int) -> FileEntry:
    return replace(file.put(storage, f"{prefix}/{home_file(home, 0, 0, 1)}", source, budget=budget), kind=home)


def _plan(source: TensorSource) -> dict[Home, ArchiveFile]:
    """Which file holds what. `InvalidStateError` for a state that no checkpoint can hold."""
    tree, facts, ties = source.tree, source.tensors, source.ties
    if not isinstance(tree, Mapping) or not tree or not all(isinstance(key, str) for key in tree):
        raise InvalidStateError("a state has parts by name, such as model and optimizer; this one has none")
    if MODEL_KEY in tree:
        raise InvalidStateError(f"{MODEL_KEY!r} is what the files call the model's entry; no part can have that name")
    files = {home: ArchiveFile() for home in _HOMES}
    for part, below in tree.items():
        file = files["model" if part == "model" else "rank"]
        file.tree[part] = walk(below, TensorName, partial(file.take, facts=facts, ties=ties), (part,))
    if files["model"].tree:
        files["model"].tree[MODEL_KEY] = "model"
    return {home: file for home, file in files.items() if file.tree}
