"""What has become of the saves of a manager: which failures nobody has looked at, how many came in a row."""

from __future__ import annotations

import logging

from shardckpt.engine.pending import PendingSave
from shardckpt.errors import CheckpointError

_log = logging.getLogger(__name__)


class Tally:
    """On the training's thread of every rank. A save that was skipped is neither a success nor a failure."""

    def __init__(self, *, tolerate: int) -> None:
        """`tolerate`: how many failures in a row are only logged."""
        self._tolerate = tolerate
        self._waiting: list[PendingSave] = []
        self._failed_in_a_row = 0
        self._skipped = 0

    @property
    def skipped(self) -> int:
        """How many of the saves that are over were skipped."""
        return self._skipped + sum(pending.skipped for pending in self._waiting)

    def add(self, pending: PendingSave) -> None:
        """A save has begun."""
        self._waiting.append(pending)

    def account(self, *, newest: int = 0) -> CheckpointError | None:
        """Look at each that is over, once and in order, but for the `newest`; gives the failure that is to be raised.

        That is the last one, if too many in a row have failed, whoever has looked at it: ranks that did not raise would
        go on to save alone. Others are logged, unless somebody has looked at them.
        """
        due: CheckpointError | None = None
        while len(self._waiting) > newest and self._waiting[0].done():
            due = self._account_for(self._waiting.pop(0))
        return due

    def unseen(self) -> CheckpointError | None:
        """The first failure that nobody has looked at and that was not logged yet, once."""
        errors = (pending.unseen_error() for pending in self._waiting)
        return next((error for error in errors if error is not None), None)

    def _account_for(self, pending: PendingSave) -> CheckpointError | None:
        if pending.skipped:
            self._skipped += 1
            return None
        error = pending.failure()
        self._failed_in_a_row = self._failed_in_a_row + 1 if error is not None else 0
        if error is None:
            return None
        unseen = pending.unseen_error() is not None
        if self._failed_in_a_row > self._tolerate:
            return error
        if unseen:
            text = "%s (failure %d in a row; training goes on, the next is tried)"
            _log.error(text, error, self._failed_in_a_row)
        return None
