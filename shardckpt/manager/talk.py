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
    CheckpointNotFoundError,
    CheckpointSaveError,
    GangError,
    InvalidStateError,
)
from shardckpt.gang.announce import announce
from shardckpt.gang.base import Gang
from shardckpt.gang.together import together

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
    """Called by all ranks in the same order, on the training's thread; a gang of its own."""

    def __init__(self, gang: Gang, *, timeout: timedelta) -> None:
        self.gang = gang
        self.timeout = timeout
        self._tries: Counter[str] = Counter()

    def enter(self, verb: str) -> None:
        """Begin a conversation: all ranks meet under this name."""
        self._tries[verb] += 1
        self.gang.enter(f"{verb}/{self._tries[verb]}", timeout=self.timeout)

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

    def close(self) -> None:
        self.gang.close()
