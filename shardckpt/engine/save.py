"""Save one step: plan and stage on the caller's thread, then write, exchange receipts and commit on the save thread.

Each phase runs in `together`: it ends on every rank with success, or with one error that names who failed. The
save thread has a gang of its own; the training's process groups are never used.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.hooks import StepHooks, memory_of_optimizers
from shardckpt.engine.patience import within
from shardckpt.engine.pending import CheckpointInfo, PendingSave
from shardckpt.engine.progress import SaveReport
from shardckpt.engine.saving.plan import SavePlan, plan_save
from shardckpt.engine.saving.receipts import TableBook, describe_own
from shardckpt.engine.saving.stage import Stager, Staging
from shardckpt.engine.saving.transaction import Transaction
from shardckpt.engine.saving.write import Receipt, write_files
from shardckpt.errors import CheckpointError, CheckpointSaveError, CommitUnknownError, GangError, InvalidStateError
from shardckpt.format.layout import step_folder
from shardckpt.gang.base import Gang
from shardckpt.state import Part
from shardckpt.storage.base import RenamingStorage, Storage

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """What one save is asked for, beside step and state."""

    model_key: str = "model"
    replicated: Collection[str] = ()
    """Top-level keys that all data-parallel ranks of a shard hold alike ("*": all)."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The user's own JSON, kept in the record; rank 0's is taken."""
    overlap: bool = True
    """Copy parameters and optimizer state while training goes on to its next optimizer step."""


@dataclass(slots=True)
class _Work:
    """One save on its way through the save thread."""

    pending: PendingSave
    options: SaveOptions
    scope: str
    began: float
    plan: SavePlan | None = None
    staging: Staging | None = None
    later: Callable[[torch.Tensor], bool] = lambda _: False
    alike: dict[str, dict[str, str]] = field(default_factory=dict)
    """By group: digests of what this rank holds of the tensors that one rank writes for several."""
    error: BaseException | None = None
    """What went wrong before the save thread took over; the other ranks are told."""


class Saver:
    """Saves steps of one run, one after the other. Used by all ranks in step; `start` on the training's thread."""

    def __init__(
        self,
        storage: Storage,
        gang: Gang,
        coordinates: Coordinates,
        *,
        timeout: timedelta,
        on_commit: Callable[[CheckpointInfo, PendingSave], None] = lambda info, pending: None,
    ) -> None:
        self._storage = storage
        self._gang = gang
        self._at = coordinates
        self._timeout = timeout
        self._on_commit = on_commit
        self._stager = Stager(in_ranges=isinstance(storage, RenamingStorage))
        self._hooks = StepHooks()
        self._tries: Counter[int] = Counter()
        self._book = TableBook()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shardckpt-save")
        self._last: PendingSave | None = None
        self._closed = False

    @property
    def last(self) -> PendingSave | None:
        """The save that was started last."""
        return self._last

    def start(self, step: int, take_parts: Callable[[], Sequence[Part]], options: SaveOptions) -> PendingSave:
        """Begin to save; returns when what training may change next is safe. Waits for an earlier save to be written.

        An error of this rank's state is raised here at once, and on the other ranks by their `PendingSave`.
        """
        if self._closed:
            raise CheckpointSaveError(f"step {step} was not saved: the manager is closed already", step=step)
        pending = PendingSave(step)
        work = _Work(pending, options, f"save/{step}/{self._tries[step]}", time.perf_counter())
        with pending.stalling():
            step_folder(step)
            self._tries[step] += 1
            self.drain()
            self._last = pending
            try:
                self._stage_now(work, take_parts())
            except BaseException as error:
                work.error = error
            here = work.error  # what the save thread runs into from now on comes up in the `PendingSave`
            self._thread.submit(self._run, work)
        if here is not None:
            pending.mark_seen()
            raise here
        return pending

    def drain(self) -> None:
        """Wait until no save is under way. Raises nothing."""
        if self._last is not None:
            self._last.wait()

    def wait_until_staged(self) -> None:
        """Hold whoever wants to change parameters until the copy is done."""
        if self._last is not None:
            self._last.wait_until_staged()

    def close(self) -> None:
        """Let the save under way end, then give everything back. Raises nothing."""
        self._closed = True
        self._thread.shutdown(wait=True)
        self._hooks.remove()
        self._stager.close()

    def _stage_now(self, work: _Work, parts: Sequence[Part]) -> None:
        options = work.options
        check_metadata(options.metadata)
        work.plan = plan_save(parts, self._at, model_key=options.model_key, replicated=options.replicated)
        work.staging = self._stager.prepare(work.plan, rank=self._at.rank)
        work.pending.report.nbytes = work.staging.nbytes
        memory = memory_of_optimizers(parts) if options.overlap else frozenset()
        work.later = lambda tensor: tensor.data_ptr() in memory
        work.staging.copy(lambda tensor: not work.later(tensor))
        self._hooks.install(parts, work.pending)

    def _run(self, work: _Work) -> None:
        """On the save thread. Never raises: what happens ends in the `PendingSave`."""
        pending = work.pending
        try:
            self._stage_later(work)
            info = self._write_and_commit(work)
        except BaseException as error:
            pending.fail(_as_save_error(error, pending.step))
            return
        pending.report.total_s = time.perf_counter() - work.began
        pending.report.total_nbytes = info.nbytes
        pending.finish(info)
        try:
            self._on_commit(info, pending)
        except Exception:
            _log.exception("step %d is committed, but what was to be done after it failed", info.step)

    def _stage_later(self, work: _Work) -> None:
        """The copies that training may overlap with. Whatever happens, training is not held longer than this."""
        began = time.perf_counter()
        try:
            if work.error is None and work.staging is not None:
                work.staging.copy(work.later)
        except BaseException as error:
            work.error = error
        finally:
            work.pending.mark_staged()
            work.pending.report.stage_s = time.perf_counter() - began

    def _write_and_commit(self, work: _Work) -> CheckpointInfo:
        step, report = work.pending.step, work.pending.report
        attempt = Transaction(self._storage, self._gang, self._book, step=step, timeout=self._timeout)
        try:
            attempt.begin(work.scope)
            with _timed(report, "write_s"):
                attempt.write(lambda prefix: self._write(work, prefix))
            with _timed(report, "commit_s"):
                attempt.compare(work.alike)
                assert work.plan is not None
                committed = attempt.commit(work.plan, work.options.metadata)
        except BaseException:
            attempt.abandon()
            raise
        report.slowest_rank = committed.slowest_rank
        url = f"{self._storage.url.rstrip('/')}/{step_folder(step)}"
        metadata = dict(work.options.metadata)
        return CheckpointInfo(step, url, committed.nbytes, self._at.world_size, committed.created, metadata)

    def _write(self, work: _Work, prefix: str) -> Receipt:
        if work.error is not None:
            raise work.error
        assert work.plan is not None
        assert work.staging is not None
        sealed = work.staging.seal()
        began = time.perf_counter()
        work.pending.report.nbytes = sum(file.end - file.start for file in sealed)
        progress = work.pending.progress
        try:
            files = within(
                self._timeout, lambda: write_files(self._storage, prefix, sealed, progress), what="writing the files"
            )
        except TimeoutError:
            progress.cancel()  # at its next part, if it ever comes to it
            self._stager.forsake()
            raise
        seconds = {"write": time.perf_counter() - began, "stage": work.pending.report.stage_s}
        work.alike = work.staging.alike()
        return describe_own(self._at, work.plan, sealed, files, work.alike, seconds)


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """`InvalidStateError` for what the record could not hold."""
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidStateError(f"metadata must be JSON (strings, finite numbers, lists, dicts): {error}") from error


def _as_save_error(error: BaseException, step: int) -> CheckpointError:
    """What `result` raises: always of the tree, always with the step and the cause."""
    if isinstance(error, CheckpointSaveError):
        return error
    unknown, reason = isinstance(error, CommitUnknownError), str(error)
    if isinstance(error, GangError):
        unknown = any(failure.kind == CommitUnknownError.__name__ for failure in error.failures.values())
        reason = error.brief
    kind, what = (CommitUnknownError, "may or may not be saved") if unknown else (CheckpointSaveError, "was not saved")
    wrapped = kind(f"step {step} {what}: {reason}", step=step)
    wrapped.__cause__ = error
    return wrapped


@contextmanager
def _timed(report: SaveReport, name: str) -> Iterator[None]:
    """Put the seconds inside into the report, also when they end in an error."""
    began = time.perf_counter()
    try:
        yield
    finally:
        setattr(report, name, time.perf_counter() - began)
