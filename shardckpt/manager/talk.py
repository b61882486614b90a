"""How the ranks of a manager agree on the training's thread: what rank 0 does for all, and what all do at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from shardckpt.engine.patience import within
from shardckpt.errors import (
    CheckpointDamagedError,
    CheckpointDeleteError,
    CheckpointError,
    CheckpointLoadError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    GangError,
    InvalidStateError,
    RootNotSharedError,
)
from shardckpt.gang.announce import announce
from shardckpt.gang.base import Gang
from shardckpt.gang.together import together, together_gather

T = TypeVar("T")

_SAME: dict[str, type[CheckpointError]] = {
    kind.__name__: kind
    for kind in (
        CheckpointNotFoundError,
        CheckpointDamagedError,
        CheckpointLoadError,
        CheckpointSaveError,
        CheckpointDeleteError,
        InvalidStateError,
    )
}
"""Errors of rank 0 that are of the same kind on every rank."""


class Talk:
    """Called by all ranks in the same order, on the training's thread; a gang of its own.

    `at_first`: what all ranks do at the beginning of their first conversation. A `RootNotSharedError` of it is raised
    again at the beginning of every later one.
    """

    def __init__(self, gang: Gang, *, timeout: timedelta, at_first: Callable[[], None] | None = None) -> None:
        self.gang = gang
        self.timeout = timeout
        self._tries: Counter[str] = Counter()
        self._at_first = at_first
        self._unshared: RootNotSharedError | None = None

    def enter(self, verb: str, *, step: int | None = None) -> None:
        """Begin a conversation: all ranks meet under this name."""
        if self._unshared is not None:
            raise self._unshared
        at_first, self._at_first = self._at_first, None  # by the number of calls, so alike on all ranks
        self._tries[verb] += 1
        try:
            self.gang.enter(f"{verb}/{self._tries[verb]}", timeout=self.timeout)
            if at_first is not None:
                at_first()
        except GangError as error:
            error.step = step
            raise
        except RootNotSharedError as error:
            self._unshared = error
            raise

    def from_rank_0(self, work: Callable[[], Any], phase: str, *, step: int | None = None) -> Any:
        """Rank 0 does it; all get its result (JSON), or the same error, of the same kind. In a conversation."""
        bounded = partial(within, self.timeout, work, what=phase)
        try:
            return announce(self.gang, bounded, phase=phase, timeout=self.timeout, step=step)
        except GangError as error:
            failure = error.failures.get(0)
            kind = _SAME.get(failure.kind) if failure else None
            if failure is None or kind is None:
                raise
            raise kind(failure.message, step=step) from error

    def together(self, work: Callable[[], T], phase: str, *, step: int | None = None) -> T:
        """All do it, and it succeeds on all or raises the same `GangError` on all. In a conversation."""
        return together(self.gang, work, phase=phase, timeout=self.timeout, step=step)

    def gather(self, work: Callable[[], Any], phase: str, *, step: int | None = None) -> list[Any] | None:
        """As `together`; rank 0 gets what each rank's gave (JSON), in rank order. An error that a rank raised is of the
        same kind on all."""
        bounded = partial(within, self.timeout, work, what=phase)
        try:
            return together_gather(self.gang, bounded, phase=phase, timeout=self.timeout, step=step)
        except GangError as error:
            kinds = {failure.kind for failure in error.failures.values()}
            kind = next((_SAME[kind] for kind in _SAME if kind in kinds), None)
            if kind is None:
                raise
            raise kind(error.brief, step=step) from error

    def together_load(self, work: Callable[[], T], phase: str, *, step: int) -> T:
        """As `together`, for reading: what is wrong with a file on one rank is a `CheckpointLoadError` on all."""
        try:
            return self.together(work, phase, step=step)
        except GangError as error:
            kinds = {failure.kind for failure in error.failures.values()}
            of_load = (CheckpointDamagedError, CheckpointMismatchError)
            kind = next((kind for kind in of_load if kind.__name__ in kinds), CheckpointLoadError)
            raise kind(f"step {step}: {error.brief}", step=step) from error

    def close(self) -> None:
        self.gang.close()
