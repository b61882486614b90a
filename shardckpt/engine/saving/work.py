"""One save as it goes from phase to phase: what was asked for, what there is so far, and how it failed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from shardckpt.engine.background.lease import Lease
from shardckpt.engine.background.policy import StagingMode
from shardckpt.engine.committing.transaction import Transaction
from shardckpt.engine.patience import Limit
from shardckpt.engine.pending import PendingSave
from shardckpt.engine.saving.plan import SavePlan
from shardckpt.engine.saving.stage import Stager, Staging
from shardckpt.engine.saving.staging.file import Wanted, nothing
from shardckpt.errors import (
    CheckpointError,
    CheckpointSaveError,
    CheckpointSkippedError,
    CommitUnknownError,
    GangError,
    InvalidStateError,
)
from shardckpt.format.manifest import FileEntry
from shardckpt.storage.base import UploadId


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """What one save is asked for, beside step and state."""

    model_key: str = "model"
    replicated: Collection[str] = ()
    """Top-level keys that all data-parallel ranks of a shard hold alike ("*": all)."""
    frozen: Collection[str] = ()
    """What does not change from step to step; see `frozen_names`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The user's own JSON, kept in the record; rank 0's is taken."""
    staging: StagingMode = "overlap"
    deadline: timedelta | None = None
    """How long the save may take, from the call on."""
    verify: bool = False
    """Sum the state up when it is staged, and again when it is written."""


@dataclass(slots=True)
class Work:
    """One save on its way to its commit."""

    pending: PendingSave
    scope: str
    began: float
    limit: Limit
    stager: Stager = field(default_factory=Stager)
    options: SaveOptions = field(default_factory=SaveOptions)
    plan: SavePlan | None = None
    staging: Staging | None = None
    later: Wanted = nothing
    give_up_copy: Callable[[], None] = lambda: None
    """Let the save fail, and training go on, if copying `later` does not come to an end."""
    give_up_save: Callable[[], None] = lambda: None
    """Let the save fail, and another thread take the place of the one that it hangs in."""
    lease: Lease = field(default_factory=Lease)
    alike: dict[str, dict[str, str]] = field(default_factory=dict)
    """By group: digests of what this rank holds of the tensors that one rank writes for several."""
    attempt: Transaction | None = None
    """Begun already, where files are written before the commit is asked for."""
    files: list[FileEntry] = field(default_factory=list)
    """Of this rank, written already."""
    uploads: Mapping[str, UploadId] = field(default_factory=dict)
    """Of files that ranks put together."""
    error: BaseException | None = None
    """What went wrong before the save thread took over; the other ranks are told."""

    def led(self) -> list[str]:
        """The files that this rank puts together with others, and answers for; raises what went wrong so far."""
        if self.error is not None:
            raise self.error
        return self.staging.led if self.staging is not None else []

    def hold(self) -> None:
        """Before training changes the state: what it queues on devices is to come after the copies queued there."""
        staging = self.staging
        if staging is not None:
            staging.hold()

    def let_go(self) -> None:
        """It is over: the state is not held any longer."""
        if self.staging is not None:
            self.staging.let_go()
        self.plan, self.staging, self.later = None, None, nothing


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """`InvalidStateError` for what the record could not hold."""
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidStateError(f"metadata must be JSON (strings, finite numbers, lists, dicts): {error}") from error


def as_save_error(error: BaseException, step: int) -> CheckpointError:
    """What `result` raises: always of the tree, always with the step and the cause."""
    if isinstance(error, CheckpointSaveError):
        return error
    unknown, reason = isinstance(error, CommitUnknownError), str(error) or type(error).__name__
    if isinstance(error, GangError):
        kinds = {failure.kind for failure in error.failures.values()}
        if kinds == {CheckpointSkippedError.__name__} and not error.absent:
            skipped = CheckpointSkippedError(next(iter(error.failures.values())).message, step=step)
            skipped.__cause__ = error
            return skipped
        unknown, reason = CommitUnknownError.__name__ in kinds, error.brief
    kind, what = (CommitUnknownError, "may or may not be saved") if unknown else (CheckpointSaveError, "was not saved")
    wrapped = kind(f"step {step} {what}: {reason}", step=step)
    wrapped.__cause__ = error
    return wrapped
