"""A checkpoint between its begin and its commit: what was given so far, in the order in which it may be given."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from torch import nn

from shardckpt.engine.carry import put_metadata
from shardckpt.engine.consolidated.write import write_consolidated
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.patience import within
from shardckpt.engine.pending import PendingSave
from shardckpt.engine.save import Saver
from shardckpt.engine.saving.work import SaveOptions
from shardckpt.errors import CheckpointSaveError, InvalidOperationError
from shardckpt.format.layout import CONSOLIDATED, SCORE, metadata_file
from shardckpt.format.manifest import FileEntry
from shardckpt.gang.base import Gang
from shardckpt.gang.together import together
from shardckpt.run.scores import encode_score
from shardckpt.state import StateReader
from shardckpt.storage.base import Storage

_log = logging.getLogger(__name__)


class OpenCheckpoint:
    """One per `begin_checkpoint`. Called by all ranks in the same order, on the training's thread.

    Each method ends on all ranks with success or the same error. After an error the attempt is gone from all ranks, as
    if it had never been begun; whoever holds this lets go of it.
    """

    def __init__(
        self, storage: Storage, saver: Saver, reader: StateReader, at: Coordinates, *, step: int, timeout: timedelta
    ) -> None:
        self.score: float | None = None
        self._storage = storage
        self._saver = saver
        self._reader = reader
        self._at = at
        self._timeout = timeout
        self._work = saver.open(step)
        self.step = self._work.pending.step
        self._has_state = self._has_model = self._has_metadata = False

    @property
    def is_over(self) -> bool:
        """Whether it has failed or was given up."""
        return self._work.pending.done()

    def save_state(self, state: Mapping[str, Any], *, model_key: str, replicated: Collection[str]) -> None:
        """Take a private copy of the state; it may change as soon as this returns."""
        self._once("save_state", self._has_state)
        options = SaveOptions(model_key, replicated, staging="blocking")
        self._saver.stage(self._work, lambda: self._reader.take_apart(state), options)
        self._has_state = True
        if self._has_model and self._is_whole_model_staged():
            self._saver.add(self._work, self._drop_consolidated)

    def save_metadata(self, metadata: Mapping[str, Any] | None) -> None:
        """Write the metadata; the first rank of each model shard does."""
        self._once("save_metadata", self._has_metadata)
        name = metadata_file(self._at.shard, self._at.shards)

        def write(gang: Gang, prefix: str) -> Sequence[FileEntry]:
            own: list[FileEntry] = []

            def put() -> None:
                if self._at.leads and metadata is not None:
                    put_it = partial(put_metadata, self._storage, prefix, metadata, name=name, writer=self._at.rank)
                    own.append(within(self._timeout, put_it, what="writing the metadata"))

            together(gang, put, phase="metadata", timeout=self._timeout, step=self.step)
            return own

        self._saver.add(self._work, write)
        self._has_metadata = True

    def save_consolidated(self, model: nn.Module) -> None:
        """Write the whole model as plain tensors, unless the file of that name holds it already."""
        self._once("save_consolidated_fsdp_model", self._has_model)
        if self._is_whole_model_staged():
            _log.info("step %d: model.pt has the whole model already, as save_state was given it", self.step)
            self._has_model = True
            return

        def write(gang: Gang, prefix: str) -> Sequence[FileEntry]:
            entry = write_consolidated(
                self._storage,
                gang,
                self._at,
                model=model,
                prefix=prefix,
                step=self.step,
                timeout=self._timeout,
                model_key=self._work.options.model_key,
            )
            return [entry] if entry is not None else []

        self._saver.add(self._work, write)
        self._has_model = True

    def commit(self) -> PendingSave:
        """Hand over to the save thread."""
        if not (self._has_state or self._has_model):
            self.abort("it is empty: neither save_state nor save_consolidated_fsdp_model was called for it")
            raise CheckpointSaveError(
                f"step {self.step} was not saved: it is empty; call save_state (or save_consolidated_fsdp_model) "
                "between begin_checkpoint and commit_checkpoint",
                step=self.step,
            )
        if self.score is not None:
            self._work.pending.give(SCORE, encode_score(self.score))
        return self._saver.finish(self._work)

    def abort(self, reason: str) -> None:
        """Give it up, on this rank at least; see `Saver.abort`."""
        self._saver.abort(self._work, reason)

    def _is_whole_model_staged(self) -> bool:
        """Whether the state that was taken goes to a model.pt of its own: the same on all ranks."""
        files = self._work.plan.files if self._work.plan is not None else ()
        return self._at.shards == 1 and any(file.home == "model" for file in files)

    def _drop_consolidated(self, gang: Gang, prefix: str) -> Sequence[FileEntry]:
        """Make room for the model.pt of the state."""
        dropped = [file for file in self._work.files if file.kind == CONSOLIDATED]
        keys = [f"{prefix}/{file.name}" for file in dropped]
        delete = partial(within, self._timeout, partial(self._storage.delete, keys), what="removing the model")
        together(gang, delete, phase="model", timeout=self._timeout, step=self.step)
        self._work.files = [file for file in self._work.files if file.kind != CONSOLIDATED]
        return ()

    def _once(self, method: str, done: bool) -> None:
        if done:
            raise InvalidOperationError(
                f"{method} was called before for step {self.step}: commit or abort it first", step=self.step
            )
