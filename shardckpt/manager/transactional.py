"""fairseq2's checkpoint manager, by its names and with its meaning, over the same engine.

Source: fairseq2 v0.4, `FileCheckpointManager`. What is different, on purpose: nothing is in force before
`commit_checkpoint`, and the step that is replaced until then; a method that fails on one rank fails on all, and the
attempt is then gone; files are named by the global rank; what was saved by one job is never half of another's state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from shardckpt.engine.carry import metadata_entry, read_metadata
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.pending import PendingSave
from shardckpt.engine.save import Saver
from shardckpt.errors import (
    CheckpointDamagedError,
    CheckpointDeleteError,
    CheckpointNotFoundError,
    InvalidOperationError,
    InvalidStateError,
)
from shardckpt.format.manifest import Manifest
from shardckpt.manager.finding import Finder
from shardckpt.manager.opened import OpenCheckpoint
from shardckpt.manager.talk import Talk
from shardckpt.manager.tally import Tally
from shardckpt.run.card import write_model_card
from shardckpt.run.catalog import Catalog, Entry
from shardckpt.run.deletion import delete_step, preserve_model
from shardckpt.run.history import History
from shardckpt.run.retention import KeepBest, KeepLast, Policy
from shardckpt.state import StateReader
from shardckpt.storage.base import Storage


class TransactionalFace(ABC):
    """`begin_checkpoint`, `save_...`, `commit_checkpoint`; loads that give dicts; deletion and retention by call.

    All methods are called by all ranks, in the same order, on the training's thread.
    """

    _storage: Storage
    _saver: Saver
    _reader: StateReader
    _at: Coordinates
    _talk: Talk
    _finder: Finder
    _catalog: Catalog
    _history: History
    _tally: Tally
    _open: OpenCheckpoint | None

    @abstractmethod
    def _account_for_last(self) -> None:
        """Raise the failure of the last save if too many have failed in a row."""

    def begin_checkpoint(self, step_nr: int) -> None:
        """Begin a checkpoint. A committed one of the same number stays in force until this one is committed."""
        self._none_open("begin_checkpoint")
        self._account_for_last()
        terms: dict[str, Any] = {"step": step_nr, "timeout": self._talk.timeout}
        self._open = OpenCheckpoint(self._storage, self._saver, self._reader, self._at, **terms)

    def save_state(
        self, state: Mapping[str, Any], *, model_key: str = "model", replicated_keys: Collection[str] | None = None
    ) -> None:
        """Take a copy of the state; it may change as soon as this returns, and is written at the commit.

        Args:
            state: state dicts (or live objects), tensors and plain values, in nested dicts.
            model_key: the key of the model's state, which goes to `model.<r>.pt` where data-parallel ranks hold it
                alike.
            replicated_keys: top-level keys, or {"*"}, that all data-parallel ranks hold alike: stored once. They are
                compared; if they differ, the commit fails.
        """
        replicated = replicated_keys or ()
        self._with_open(lambda it: it.save_state(state, model_key=model_key, replicated=replicated))

    def save_metadata(self, metadata: Mapping[str, Any] | None) -> None:
        """Store values and tensors beside the state, in `metadata.<r>.pt`; the first data-parallel rank's are taken.

        None stores nothing; the other ranks may give None, too.
        """
        self._with_open(lambda it: it.save_metadata(metadata))

    def save_score(self, score: float | None, lower_better: bool = False, *, step: int | None = None) -> None:
        """Give the open checkpoint its score, or `step` a score that is committed or still being saved.

        Stored is the number, of which more is better for `keep_best_n_checkpoints` and `KeepBest`: with `lower_better`
        the negated score, as fairseq2 does. If the manager's own policy is `KeepBest(lower_better=True)`, give the
        plain score.
        """
        if step is None:
            opened = self._take_open("save_score")
            self._open = opened
            opened.score = self._stored_score(score, lower_better=lower_better, step=opened.step)
        else:
            stored = self._stored_score(score, lower_better=lower_better, step=step)
            if stored is not None:
                self._score_step(step, stored)

    def save_consolidated_fsdp_model(self, model: nn.Module) -> None:
        """Write the whole model, unsharded, as plain tensors, into `model.pt` of the open checkpoint.

        For FSDP2 and FSDP1, with and without tensor parallelism, and any other module. No rank gathers the model, and
        the training's groups are not used. It is done when this returns.
        """
        self._with_open(lambda it: it.save_consolidated(model))

    def commit_checkpoint(self, *, blocking: bool = True) -> PendingSave:
        """Put the open checkpoint in force; what the ranks gave is written by all of them at once.

        With `blocking=False` this goes on in the background: `result()` of what is given back waits for it.
        """
        pending = self._take_open("commit_checkpoint").commit()
        self._tally.add(pending)
        if blocking:
            pending.result()
        return pending

    def abort_checkpoint(self) -> None:
        """Give the open checkpoint up, if there is one; nothing of it stays. The step's older one is as it was.

        Where only some ranks call this, the others fail as soon as they go on with it.
        """
        self._give_up("abort_checkpoint() was called")

    def load_checkpoint(self, step_nr: int) -> dict[str, Any]:
        """All that this rank saved in that step, tensors on the CPU, sharded ones as DTensors again.

        On another number of ranks, what all held alike; `CheckpointMismatchError` if there is more than that.
        """
        self._saver.drain()
        self._talk.enter(f"load/{step_nr}", step=step_nr)
        folder, manifest = self._finder.record(step_nr)
        with self._finder.loading(folder, manifest) as loader:
            return loader.load_everything()

    def load_last_checkpoint(self) -> tuple[int, dict[str, Any]]:
        """The newest step that is good, and its state. `CheckpointNotFoundError` if there is no step.

        Steps of which only the model was kept are not looked at. Damaged ones are passed over, and the log says why.
        """
        self._saver.drain()
        steps = self._finder.in_turn(self._catalog.full_steps)
        found = self._finder.first_good(steps, self.load_checkpoint, fresh=False)
        if found is None:
            raise CheckpointNotFoundError(f"there is no checkpoint to go on from in {self._storage.url}")
        return found

    def load_metadata(self, step_nr: int) -> dict[str, Any] | None:
        """What `save_metadata` stored with that step; None if nothing was."""
        self._saver.drain()
        self._talk.enter(f"metadata/{step_nr}", step=step_nr)
        folder, manifest = self._finder.record(step_nr)

        def read() -> dict[str, Any] | None:
            entry = metadata_entry(manifest, self._at)
            return None if entry is None else dict(read_metadata(self._storage, folder, entry, step=step_nr))

        return self._talk.together_load(read, "read the metadata", step=step_nr)

    def has_checkpoint(self, step_nr: int | None = None) -> bool:
        """Whether that step is committed, or any."""
        self._talk.enter("steps")
        return bool(self._talk.from_rank_0(lambda: self._catalog.has(step_nr), "look for the step"))

    def get_step_numbers(self) -> list[int]:
        """The committed steps, in order. Rank 0 looks, all are told the same."""
        self._talk.enter("steps")
        return list(self._talk.from_rank_0(self._catalog.steps, "list the steps"))

    def delete_checkpoint(self, step_nr: int, *, missing_ok: bool = False, preserve_model: bool = False) -> None:
        """Delete a committed step, or all of it but its model. A crash leaves that, or the whole step."""
        self._saver.drain()
        self._talk.enter(f"delete/{step_nr}", step=step_nr)
        work = _Deletion(self._history, self._catalog, step_nr, missing_ok=missing_ok, preserve=preserve_model)
        self._talk.from_rank_0(work.run, "delete", step=step_nr)

    def keep_last_n_checkpoints(self, n: int, *, preserve_model: bool = False) -> None:
        """Delete all but the `n` steps of the highest numbers; with `preserve_model` the models of the others stay."""
        self._retain(KeepLast(_at_least_one(n)), preserve_model=preserve_model)

    def keep_best_n_checkpoints(self, n: int, *, preserve_model: bool = False) -> None:
        """Delete all but the `n` steps of the best scores and the last one; `preserve_model` as above."""
        self._retain(KeepBest(_at_least_one(n)), preserve_model=preserve_model)

    def save_model_metadata(self, family: str, config: Mapping[str, Any], *, tokenizer: str | None = None) -> None:
        """Write the run's `model.yaml`: which model its checkpoints are of. On rank 0."""
        self._talk.enter("model.yaml")
        terms: dict[str, Any] = {"family": family, "config": config, "tokenizer": tokenizer}
        shards = self._at.shards
        self._talk.from_rank_0(lambda: write_model_card(self._storage, shards=shards, **terms), "write model.yaml")

    def _retain(self, policy: Policy, *, preserve_model: bool) -> None:
        self._saver.drain()  # a step that is being replaced must not be deleted
        self._talk.enter("retain")

        def retain() -> list[int]:
            return [gone.step for gone in self._history.retain(policy, preserve_model=preserve_model)]

        self._talk.from_rank_0(retain, "delete steps")

    def _score_step(self, step: int, score: float) -> None:
        pending = self._saver.of_step(step)

        def note_or_write() -> None:
            if pending is None or not self._history.note(step, score, save=pending):
                self._history.write_score(step, score)

        self._talk.enter(f"score/{step}", step=step)
        self._talk.from_rank_0(note_or_write, "write the score", step=step)

    def _stored_score(self, score: float | None, *, lower_better: bool, step: int) -> float | None:
        """The number of which more is better."""
        if lower_better and self._history.prefers_lower:
            raise InvalidStateError(
                "lower_better is said twice: keep=KeepBest(..., lower_better=True) wants the score as it is, and "
                "save_score(..., lower_better=True) negates it; leave one of them out",
                step=step,
            )
        if score is None:
            return None
        try:
            number = float(score)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InvalidStateError(f"a score is a number, not {score!r:.80}: {error}", step=step) from error
        if number != number:
            raise InvalidStateError(
                "a score cannot be NaN: it is neither better nor worse than another; leave it out", step=step
            )
        return -number if lower_better else number

    def _with_open(self, act: Callable[[OpenCheckpoint], None]) -> None:
        opened = self._take_open("this")
        try:
            act(opened)
        except BaseException:
            if not opened.is_over:  # it was out of turn, or the wait for it was interrupted
                self._open = opened
            raise
        self._open = opened

    def _take_open(self, method: str) -> OpenCheckpoint:
        opened, self._open = self._open, None
        if opened is None:
            raise InvalidOperationError(f"begin_checkpoint() must be called first, before {method}")
        return opened

    def _none_open(self, method: str) -> None:
        if self._open is not None:
            raise InvalidOperationError(
                f"{method} was called while the checkpoint of step {self._open.step} is open: call commit_checkpoint() "
                "or abort_checkpoint() first",
                step=self._open.step,
            )

    def _give_up(self, reason: str) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.abort(reason)


def _at_least_one(n: int) -> int:
    if n < 1:
        raise InvalidStateError(f"{n} checkpoints cannot be kept: give 1 or more, or delete with delete_checkpoint()")
    return n


class _Deletion:
    """What rank 0 does to delete a step."""

    def __init__(self, history: History, catalog: Catalog, step: int, *, missing_ok: bool, preserve: bool) -> None:
        self._history, self._catalog = history, catalog
        self._step, self._missing_ok, self._preserve = step, missing_ok, preserve

    def run(self) -> None:
        try:
            entry = self._catalog.entry(self._step)
            if self._preserve:
                preserve_model(self._catalog.storage, entry)
            else:
                delete_step(self._catalog.storage, entry, manifest=self._record(entry))
            self._history.deleted(self._step, model_kept=self._preserve)
        except CheckpointNotFoundError as error:
            if not self._missing_ok:
                raise CheckpointDeleteError(str(error), step=self._step) from error

    def _record(self, entry: Entry) -> Manifest | None:
        """None for a damaged one: who names a step means it, whatever has become of it."""
        try:
            return self._catalog.record(entry)[1]
        except CheckpointDamagedError:
            return None
