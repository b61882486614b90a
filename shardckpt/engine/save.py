"""Save one step: plan and stage on the caller's thread, then write, exchange receipts and commit on the save thread.

Each phase runs in `together`: it ends on every rank with success, or with one error that names who failed. The
save thread has a gang of its own; the training's process groups are never used.
"""

from __future__ import annotations

import logging
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

from shardckpt.engine.carry import carry
from shardckpt.engine.committing.receipts import TableBook, describe_own
from shardckpt.engine.committing.transaction import Transaction
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.garbage import uncollected
from shardckpt.engine.patience import within
from shardckpt.engine.pending import CheckpointInfo, PendingSave
from shardckpt.engine.progress import SaveReport
from shardckpt.engine.saving.again import Planner
from shardckpt.engine.saving.hooks import StepHooks, memory_of_optimizers
from shardckpt.engine.saving.stage import Stager
from shardckpt.engine.saving.work import SaveOptions, Work, as_save_error, check_metadata
from shardckpt.engine.saving.write import Receipt, Sealed, write_files
from shardckpt.errors import CheckpointError, CheckpointSaveError, InvalidStateError
from shardckpt.format.layout import step_folder
from shardckpt.format.manifest import FileEntry
from shardckpt.gang.base import Gang
from shardckpt.gang.together import together
from shardckpt.state import Part
from shardckpt.storage.base import RenamingStorage, Storage

_log = logging.getLogger(__name__)

_FAREWELL = timedelta(seconds=5)  # how long a rank that gives up tries to tell the others so


class Saver:
    """Saves steps of one run, one after the other. Used by all ranks in step; on the training's thread.

    `start` does all at once, in the background. `open`, `stage`, `add` and `finish` do the same one by one, each ending
    on all ranks with success or the same error; `abort` gives up.
    """

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
        self._planner, self._hooks = Planner(coordinates), StepHooks()
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
        work = self._new(step)
        with work.pending.stalling():
            self.drain()
            try:
                with uncollected():
                    self._stage_now(work, take_parts(), options)
            except BaseException as error:
                work.error = error
            here = work.error  # what the save thread runs into from now on comes up in the `PendingSave`
            self.finish(work)
        if here is not None:
            work.pending.mark_seen()
            raise here
        return work.pending

    def open(self, step: int) -> Work:
        """Make room for a checkpoint that is put together call by call. Waits for an earlier save to be written."""
        work = self._new(step)
        self.drain()
        work.attempt = self._attempt(work)
        self._jointly(work, partial(work.attempt.begin, work.scope))
        return work

    def stage(self, work: Work, take_parts: Callable[[], Sequence[Part]], options: SaveOptions) -> None:
        """Take the state, all of it: it may change as soon as this returns."""
        with work.pending.stalling():
            try:
                self._stage_now(work, take_parts(), options)
            except BaseException as error:  # an interrupt, too, is told to the others before it goes on
                work.error = error
            finally:
                work.pending.mark_staged()  # an optimizer of the state may step before the commit is asked for
            self._jointly(work, lambda: self._agree(work, lambda: _raise(work.error), "stage"))

    def add(self, work: Work, make: Callable[[Gang, str], Sequence[FileEntry]]) -> None:
        """Have files written now: `make` is called on the save thread of every rank with the gang, in a conversation,
        and the prefix of the attempt; it gives the files of this rank, and ends alike on all."""
        with work.pending.stalling():
            self._jointly(work, lambda: work.files.extend(make(self._gang, self._prefix(work))))

    def finish(self, work: Work) -> PendingSave:
        """Write what is staged, and commit, in the background."""
        self._last = work.pending
        self._thread.submit(self._run, work)
        return work.pending

    def abort(self, work: Work, reason: str) -> None:
        """Give the checkpoint up. Ranks that go on with it, as they do not know, fail as soon as they next talk."""
        if work.pending.done():
            return
        error = CheckpointSaveError(f"step {work.pending.step} was not saved: {reason}", step=work.pending.step)
        with suppress(CheckpointError):
            self._jointly(work, lambda: self._agree(work, lambda: _raise(error), "abort", timeout=_FAREWELL))

    def _new(self, step: int) -> Work:
        if self._closed:
            raise CheckpointSaveError(f"step {step} was not saved: the manager is closed already", step=step)
        try:
            step_folder(step := operator.index(step))
        except (ValueError, TypeError) as error:
            raise InvalidStateError(f"{step!r} cannot be saved as a step: {error}") from error
        scope = f"save/{step}/{self._tries[step]}"
        self._tries[step] += 1
        return Work(PendingSave(step), scope, time.perf_counter())

    def _attempt(self, work: Work) -> Transaction:
        return Transaction(self._storage, self._gang, self._book, step=work.pending.step, timeout=self._timeout)

    def _prefix(self, work: Work) -> str:
        assert work.attempt is not None
        return work.attempt.prefix

    def _agree(self, work: Work, act: Callable[[], object], phase: str, *, timeout: timedelta | None = None) -> None:
        together(self._gang, act, phase=phase, timeout=timeout or self._timeout, step=work.pending.step)

    def _jointly(self, work: Work, act: Callable[[], object]) -> None:
        """Do it on the save thread, and wait. If it fails, the attempt is over; interrupts go on as they are."""

        def run() -> None:
            try:
                act()
            except BaseException:
                assert work.attempt is not None
                work.attempt.abandon()
                raise

        done = self._thread.submit(run)
        try:
            done.result()
        except BaseException as error:
            if not (done.done() and done.exception() is error):  # this wait was interrupted, and the work goes on
                raise
            work.pending.fail(error)
            work.pending.mark_seen()
            if not isinstance(error, Exception):
                raise
            raise as_save_error(error, work.pending.step) from error

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

    def _stage_now(self, work: Work, parts: Sequence[Part], options: SaveOptions) -> None:
        work.options = options
        check_metadata(options.metadata)
        work.plan = self._planner.plan(parts, model_key=options.model_key, replicated=options.replicated)
        work.staging = self._stager.prepare(work.plan, rank=self._at.rank)
        work.pending.report.nbytes = work.staging.nbytes
        memory = memory_of_optimizers(parts) if options.overlap else frozenset()
        work.later = lambda tensor: tensor.data_ptr() in memory
        work.staging.copy(lambda tensor: not work.later(tensor))
        self._hooks.install(parts, work.pending)

    def _run(self, work: Work) -> None:
        """On the save thread. Never raises: what happens ends in the `PendingSave`."""
        pending = work.pending
        try:
            self._stage_later(work)
            info = self._write_and_commit(work)
        except BaseException as error:
            pending.fail(as_save_error(error, pending.step))
            return
        pending.report.total_s = time.perf_counter() - work.began
        pending.report.total_nbytes = info.nbytes
        pending.finish(info)
        try:
            self._on_commit(info, pending)
        except Exception:
            _log.exception("step %d is committed, but what was to be done after it failed", info.step)

    def _stage_later(self, work: Work) -> None:
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

    def _write_and_commit(self, work: Work) -> CheckpointInfo:
        step, report = work.pending.step, work.pending.report
        attempt = work.attempt or self._attempt(work)
        try:
            if work.attempt is None:
                attempt.begin(work.scope)
            with _timed(report, "write_s"):
                attempt.write(lambda prefix: self._write(work, prefix))
            with _timed(report, "commit_s"):
                attempt.compare(work.alike)
                assert work.plan is not None
                committed = attempt.commit(work.plan, work.options.metadata, model_key=work.options.model_key)
        except BaseException:
            attempt.abandon()
            raise
        report.slowest_rank = committed.slowest_rank
        url = f"{self._storage.url.rstrip('/')}/{step_folder(step)}"
        metadata = dict(work.options.metadata)
        return CheckpointInfo(step, url, committed.nbytes, self._at.world_size, committed.created, metadata)

    def _write(self, work: Work, prefix: str) -> Receipt:
        if work.error is not None:
            raise work.error
        if work.plan is None or work.staging is None:  # no state, only files that are written already
            work.plan = self._planner.plan(())
            work.staging = self._stager.prepare(work.plan, rank=self._at.rank)
        sealed = work.staging.seal()
        began = time.perf_counter()
        work.pending.report.nbytes = sum(file.end - file.start for file in sealed)
        progress = work.pending.progress
        try:
            files = within(self._timeout, lambda: self._put(work, prefix, sealed), what="writing the files")
        except TimeoutError:
            progress.cancel()  # at its next part, if it ever comes to it
            self._stager.forsake()
            raise
        seconds = {"write": time.perf_counter() - began, "stage": work.pending.report.stage_s}
        work.alike = work.staging.alike()
        return describe_own(self._at, work.plan, sealed, (*files, *work.files), work.alike, seconds)

    def _put(self, work: Work, prefix: str, sealed: Sequence[Sealed]) -> tuple[FileEntry, ...]:
        files = write_files(self._storage, prefix, sealed, work.pending.progress)
        if self._at.rank:
            return files
        for name, content in work.loose.items():
            self._storage.put(f"{prefix}/{name}", [content])
        return (*files, *carry(self._storage, prefix))


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


@contextmanager
def _timed(report: SaveReport, name: str) -> Iterator[None]:
    """Put the seconds inside into the report, also when they end in an error."""
    began = time.perf_counter()
    try:
        yield
    finally:
        setattr(report, name, time.perf_counter() - began)
