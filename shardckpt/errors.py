"""The exception tree: everything that shardckpt raises on purpose is a `CheckpointError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong on one rank, in a form that travels between ranks as JSON."""

    rank: int
    kind: str
    """The exception's class name."""
    message: str
    trace: str = field(default="", repr=False)
    """The formatted traceback on the rank where it happened; empty if there is none."""

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.kind}: {self.message}"


class CheckpointError(Exception):
    """Base of all errors of this package; `step` is the training step concerned, if there is one."""

    def __init__(self, message: str, *, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class CheckpointNotFoundError(CheckpointError, LookupError):
    """No committed checkpoint of that step, or none at all."""


class CheckpointSaveError(CheckpointError):
    """A save did not commit. The older steps are as they were, and the next save may succeed."""


class CheckpointSkippedError(CheckpointSaveError):
    """A save was not made, on purpose: the `SavePolicy` says so of one that comes while others are under way."""


class CommitUnknownError(CheckpointSaveError):
    """The storage did not answer whether the record was accepted; nothing was deleted."""


class CheckpointLoadError(CheckpointError):
    """A committed step could not be loaded: damaged, unreadable, or not what the state asks for.

    `state_changed`: by then some tensors of the state were loaded, on this rank or on others, so that it must not be
    used before a step has been loaded into all of it.
    """

    state_changed = False


class CheckpointDamagedError(CheckpointLoadError):
    """Stored bytes are missing, of the wrong size, of the wrong digest, or not well-formed."""


class CheckpointMismatchError(CheckpointLoadError):
    """The checkpoint is sound but does not fit the state: `problems` lists every difference."""

    def __init__(self, message: str, *, problems: Sequence[str] = (), step: int | None = None) -> None:
        super().__init__(message, step=step)
        self.problems = tuple(problems)


class CheckpointDeleteError(CheckpointError):
    """A step could not be deleted, or not wholly; it is then no longer offered for loading."""


class RootNotSharedError(CheckpointError):
    """The root is not one place for all ranks: what one of them puts there is not seen by others."""


class InvalidStateError(CheckpointError, ValueError):
    """The state handed in holds something that cannot be stored; says which key and what to do."""


class InvalidOperationError(CheckpointError, RuntimeError):
    """A method was called out of turn: no checkpoint has been begun, or one has already."""


class GangError(CheckpointError):
    """A joint operation failed: which ranks failed and how, and which never came.

    The same error is raised on every rank of the gang that is able to raise.
    """

    def __init__(
        self,
        message: str,
        *,
        failures: Mapping[int, Failure] | None = None,
        absent: Sequence[int] = (),
        step: int | None = None,
    ) -> None:
        super().__init__(message, step=step)
        self.failures = dict(failures or {})
        self.absent = tuple(absent)

    @property
    def brief(self) -> str:
        """The message without the traceback of the rank that failed."""
        return str(self).partition("\n\nOn rank ")[0]
