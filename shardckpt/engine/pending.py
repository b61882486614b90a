"""A save under way, as its caller sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import wait as wait_for_futures
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias

from shardckpt.engine.events.kinds import Committed, Event, SaveFailed, SaveSkipped, Staged
from shardckpt.engine.progress import OtherRank, Progress, SaveReport
from shardckpt.errors import CheckpointError, CheckpointSaveError, CheckpointSkippedError


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed step."""

    step: int
    url: str
    """Where it lies, without credentials."""
    nbytes: int
    world_size: int
    created: str
    """UTC, ISO 8601."""
    metadata: dict[str, Any]
    skipped: tuple[tuple[int, str], ...] = ()
    """By `resume`: steps that were passed over, and why."""
    reason: str = ""
    """By `resume`: why this step."""
    left: dict[str, str] = field(default_factory=dict)
    """By `load` and `resume`: keys of this rank's state that stayed as they were, as the policy says -> why."""


Tell: TypeAlias = Callable[..., None]
"""`EventStream.tell`: a kind of event, the step, and what the event holds."""


def _nobody(kind: type[Event], step: int, /, **what: Any) -> None:
    """Where there is no stream of events."""


class PendingSave:
    """What `save` gives back: the save goes on by itself. Any thread may look; each rank has its own."""

    def __init__(self, step: int, tell: Tell = _nobody) -> None:
        self.step = step
        self.tell = tell
        self.report = SaveReport(step)
        self.progress = Progress()
        self.others: tuple[OtherRank, ...] = ()
        """On rank 0, once they have met: what the other ranks did, and when."""
        self.placed: Mapping[str, bytes] = {}
        """On rank 0, once it is committed: what was put beside its files together with its record."""
        self._beside: dict[str, bytes] = {}
        self._copied = threading.Event()
        self._queued = threading.Event()
        self._lock = threading.Lock()
        self._future: Future[CheckpointInfo] = Future()
        self._seen = False

    def give(self, name: str, content: bytes) -> None:
        """Have a small file put beside those of the checkpoint, which its record does not name: before the record, and
        so there as soon as that is. What comes too late for that is not in `placed`. On rank 0; any thread."""
        with self._lock:
            self._beside[name] = content

    def place(self) -> Mapping[str, bytes]:
        """What was given so far, by name. By the save thread of rank 0, just before the record."""
        with self._lock:
            self.placed = dict(self._beside)
        return self.placed

    def staged(self, timeout: timedelta | None = None) -> bool:
        """Wait until everything that training may change next has been copied; False if that took too long."""
        return self._copied.wait(None if timeout is None else timeout.total_seconds())

    def done(self) -> bool:
        """Whether it is over: committed or failed."""
        return self._future.done()

    @property
    def skipped(self) -> bool:
        """Whether the policy has passed it over, because others were under way; known, on all ranks, when it is done.

        That is no failure, though `result` raises `CheckpointSkippedError`: there is nothing to give.
        """
        return self._future.done() and isinstance(self._future.exception(), CheckpointSkippedError)

    def failure(self) -> CheckpointError | None:
        """The error of a save that has failed, whether or not anybody has looked at it; else None."""
        error = self._future.exception() if self._future.done() and not self.skipped else None
        return error if isinstance(error, CheckpointError) or error is None else _as_save_error(error, self.step)

    def result(self, timeout: timedelta | None = None) -> CheckpointInfo:
        """Wait for the commit. Raises `CheckpointSaveError` if there was none, `TimeoutError` if it is not over yet."""
        try:
            info = self._future.result(None if timeout is None else timeout.total_seconds())
        except FutureTimeoutError:
            if self._future.done():
                raise
            raise TimeoutError(f"step {self.step} is not committed yet; it goes on in the background") from None
        finally:
            self._seen = self._seen or self._future.done()
        return info

    def cancel(self) -> None:
        """Ask this rank's part to stop. The step is then committed on no rank, and every rank's result says so."""
        self.progress.cancel()

    def unseen_error(self) -> CheckpointError | None:
        """The failure that nobody has looked at yet, once: it is raised where the user next looks."""
        if self._seen or not self._future.done():
            return None
        self._seen = True
        return self.failure()

    def stalling(self, phase: str = "save") -> AbstractContextManager[None]:
        """Count the time inside as stall of the training."""
        return self.report.phase(phase)

    def wait_until_staged(self, timeout: timedelta | None = None) -> bool:
        """Called before an optimizer step: hold it until the copy is done, and count the wait. False if time is up.

        Of what lies on devices it may only be queued; `Work.hold` then has the device wait, instead of this thread.
        """
        if self._queued.is_set():
            return True
        with self.stalling("wait"):
            return self._queued.wait(None if timeout is None else timeout.total_seconds())

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it is over, in whatever way; False if that took too long. Raises nothing."""
        return not wait_for_futures([self._future], None if timeout is None else timeout.total_seconds()).not_done

    def mark_seen(self) -> None:
        """The failure has been raised elsewhere."""
        self._seen = True

    def mark_queued(self) -> None:
        """What is still to be copied has been queued on the devices that it lies on. By the copying thread."""
        self._queued.set()

    def mark_staged(self) -> None:
        """Training may change everything again. Any thread; the first time counts."""
        with self._lock:
            if not self._copied.is_set():
                self.tell(Staged, self.step, seconds=self.report.stage_s)
                self._copied.set()
        self._queued.set()

    def finish(self, info: CheckpointInfo) -> None:
        """By the save thread: committed."""
        self._copied.set()
        self._queued.set()
        try:
            self.tell(Committed, self.step, url=info.url, **self._told())
        finally:
            self._future.set_result(info)

    def fail(self, error: BaseException) -> None:
        """By the save thread, or by whoever finds that it is no more: not committed, unless it is over already."""
        self._copied.set()
        self._queued.set()
        with self._lock:
            if self._future.done():
                return
            try:
                self._tell_of(error)
            finally:
                self._future.set_exception(error)

    def _tell_of(self, error: BaseException) -> None:
        if isinstance(error, CheckpointSkippedError):
            self.tell(SaveSkipped, self.step, reason=str(error), **self._told())
        else:
            told = {"error": str(error).partition("\n")[0], "kind": type(error).__name__}
            self.tell(SaveFailed, self.step, **told, **self._told())

    def _told(self) -> dict[str, Any]:
        return {"report": self.report.frozen(), "others": self.others}


def _as_save_error(error: BaseException, step: int) -> CheckpointSaveError:
    wrapped = CheckpointSaveError(f"step {step} was not saved: {type(error).__name__}: {error}", step=step)
    wrapped.__cause__ = error
    return wrapped
