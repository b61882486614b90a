"""What is known of a save while it runs and when it is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

HELD = ("save", "wait")
"""Phases in which training stands still: in `save` itself, and waiting for the copy."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Something that took time: `save`, `wait` (of training, for the copy), `stage`, `meet` (the other ranks), `write`
    (in it `seal`, the checksums, and `put`; the rest is waiting for other ranks), `commit`, `load`."""

    name: str
    began: float
    """Seconds since 1970, by this machine's clock."""
    seconds: float
    thread: str

    @property
    def ended(self) -> float:
        return self.began + self.seconds


@dataclass(frozen=True, slots=True)
class OtherRank:
    """What rank 0 knows of another rank's part in a save; times are by that rank's clock."""

    rank: int
    began: float
    """When `save` was called there, in seconds since 1970."""
    phases: tuple[Phase, ...] = ()
    """What it did until its files were written; none if that was never."""


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
    retries: int = 0
    """How often a request of this rank to the storage was tried again, while it wrote and committed."""
    slowest_rank: int | None = None
    """The rank whose write took longest, once it is committed."""
    slowest_s: float = 0.0
    """How long that took."""
    began: float = field(default_factory=time.time)
    """When `save` was called, in seconds since 1970."""
    phases: list[Phase] = field(default_factory=list)
    """In the order in which they ended."""
    _epoch: float = field(default_factory=lambda: time.time() - time.perf_counter(), repr=False, compare=False)

    @property
    def rate(self) -> float:
        return self.total_nbytes / self.total_s if self.total_s else 0.0

    @property
    def write_rate(self) -> float:
        """Bytes per second of this rank while it wrote, checksums included."""
        return self.nbytes / self.write_s if self.write_s else 0.0

    @property
    def overlap_s(self) -> float:
        """How long the copy ran while training went on, too."""
        copies = [phase for phase in self.phases if phase.name == "stage"]
        held = [phase for phase in self.phases if phase.name in HELD]
        both = sum(max(0.0, min(a.ended, b.ended) - max(a.began, b.began)) for a in copies for b in held)
        return max(0.0, sum(copy.seconds for copy in copies) - both)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside is this phase, also when it ends in an error. Any thread."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            thread = threading.current_thread().name
            self.phases.append(Phase(name, self._epoch + began, seconds, thread))
            if name in HELD:
                self.stall_s += seconds
            elif hasattr(self, f"{name}_s"):
                setattr(self, f"{name}_s", seconds)

    def frozen(self) -> SaveReport:
        """A copy that nobody changes any more."""
        return replace(self, phases=list(self.phases))


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
