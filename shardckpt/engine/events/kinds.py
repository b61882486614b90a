"""What subscribers are told. Each rank tells of itself; of what concerns the whole run, rank 0 does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardckpt.engine.progress import OtherRank, SaveReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that has happened on this rank."""

    step: int
    rank: int
    at: float
    """Seconds since 1970, by this machine's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveStarted(Event):
    """`save` was called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged(Event):
    """The state has been copied: training may change everything again."""

    seconds: float
    """How long the copy beside training took; 0 if all was copied at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written(Event):
    """This rank's files are durable. That is not a checkpoint yet."""

    seconds: float
    nbytes: int

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOver(Event):
    """A save has ended on this rank, in one of the three ways below."""

    report: SaveReport
    """What it cost here; a copy, which nobody changes any more."""
    others: tuple[OtherRank, ...] = ()
    """On rank 0: the other ranks, if they have met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(SaveOver):
    """The step is a checkpoint."""

    url: str = ""
    """Where it lies, without credentials: an absolute path, or a URL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSkipped(SaveOver):
    """The save was not made, or was given up, because others were under way, as the policy of saving says."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(SaveOver):
    """The step was not committed, or nobody knows whether it was."""

    error: str
    kind: str
    """The class name of the error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted(Event):
    """A committed step was deleted, or all of it but its model. Told by rank 0."""

    url: str = ""
    """Where it lay."""
    reason: str = ""
    model_kept: bool = False
    """Whether its model is still there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Event):
    """A committed step was given numbers: its `score`, or metrics by name. Told by rank 0."""

    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Event):
    """A step was loaded into the state of this rank."""

    seconds: float
    nbytes: int
    """Of the whole checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAgreed(Event):
    """All ranks stop at the first step from `step` on that they ask about."""

    reason: str
    absent: tuple[int, ...] = ()
    """Ranks that did not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriberFailed(Event):
    """A subscriber, or a callback, has raised, or does not return. All others are told; no checkpoint is concerned."""

    subscriber: str
    """What it is called in the program."""
    heard: str
    """The class name of the event that it was told of `step`."""
    error: str
    kind: str
    """The class name of the error; `TimeoutError` if it does not return."""
