"""What is known of a save while it runs and when it is over."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(slots=True)
class SaveReport:
    """What one save cost on this rank. Seconds are wall-clock; `rate` is bytes per second from `save` to commit."""

    step: int
    nbytes: int = 0
    """Bytes that this rank wrote."""
    total_nbytes: int = 0
    """Bytes of the whole checkpoint; 0 until it is committed."""
    stall_s: float = 0.0
    """How long training was held up: in `save` itself, and waiting for the copy before an optimizer step."""
    stage_s: float = 0.0
    write_s: float = 0.0
    commit_s: float = 0.0
    total_s: float = 0.0
    slowest_rank: int | None = None
    """The rank whose write took longest; known on rank 0."""

    @property
    def rate(self) -> float:
        return self.total_nbytes / self.total_s if self.total_s else 0.0


class Progress:
    """Bytes written so far, and whether the save has been cancelled. Safe to use from several threads."""

    def __init__(self) -> None:
        self._written = 0
        self._lock = threading.Lock()
        self._stopped: BaseException | None = None

    @property
    def written(self) -> int:
        """Bytes of this rank's files that are durable, file by file."""
        return self._written

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._written += nbytes

    def cancel(self) -> None:
        """Ask the save to stop before it writes more."""
        self.stop(InterruptedError("the save was cancelled"))

    def stop(self, reason: BaseException) -> None:
        """As `cancel`, and say why; the first reason counts."""
        with self._lock:
            self._stopped = self._stopped or reason

    def check(self) -> None:
        """Raise the reason if the save was asked to stop. Called by writers between pieces."""
        if self._stopped is not None:
            raise self._stopped
