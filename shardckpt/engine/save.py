"""Save one step: plan and stage on the caller's thread, then write, exchange receipts and commit on the save thread.

What training changes only in an optimizer's step is copied on a thread of its own: the save thread may be busy with an
earlier save, and training waits for the copy, not for the writing.

Each phase runs in `together`: it ends on every rank with success, or with one error that names who failed. The
save thread has a gang of its own; the training's process groups are never used.
"""

from __future__ import annotations

import operator
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

from shardckpt.engine.background.flights import Flights
from shardckpt.engine.background.manners import Manners
from shardckpt.engine.background.policy import SavePolicy
from shardckpt.engine.background.worker import Worker
from shardckpt.engine.committing.committer import Committer
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.events.kinds import SaveStarted
from shardckpt.engine.garbage import uncollected
from shardckpt.engine.patience import Limit
from shardckpt.engine.pending import CheckpointInfo, PendingSave, Tell
from shardckpt.engine.saving.again import Planner
from shardckpt.engine.saving.devices.cuda import Cuda
from shardckpt.engine.saving.hooks import StepHooks, memory_of_optimizers
from shardckpt.engine.saving.share import least_share
from shardckpt.engine.saving.stage import Stager
from shardckpt.engine.saving.staging.file import everything, nothing
from shardckpt.engine.saving.staging.still import frozen_names
from shardckpt.engine.saving.work import SaveOptions, Work, as_save_error, check_metadata
from shardckpt.engine.writing.process import ProcessStorage
from shardckpt.errors import CheckpointError, CheckpointSaveError, CommitUnknownError, InvalidStateError
from shardckpt.format.layout import step_folder
from shardckpt.format.manifest import FileEntry
from shardckpt.gang.base import Gang
from shardckpt.gang.gangs import ranks_of_machine
from shardckpt.gang.together import together
from shardckpt.state import Part
from shardckpt.storage.base import Storage

_FAREWELL = timedelta(seconds=5)
"""How long a rank that gives up tries to tell the others so."""


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
        policy: SavePolicy | None = None,
        on_commit: Callable[[CheckpointInfo, PendingSave], None] = lambda info, pending: None,
        manners: Manners | None = None,
        tell: Tell = lambda kind, step, /, **what: None,
    ) -> None:
        self._gang = gang
        self._at = coordinates
        self.timeout = timeout  # of a phase; may be lowered between saves
        self._policy = policy or SavePolicy()
        self._tell = tell
        self._committer = Committer(storage, gang, coordinates, on_commit=on_commit, manners=manners or Manners())
        how: dict[str, Any] = {"least_share": least_share(storage), "shared": isinstance(storage, ProcessStorage)}
        how["devices"] = Cuda(ranks_of_machine())
        self._flights = Flights(lambda: Stager(**how))
        self._planner, self._hooks = Planner(coordinates), StepHooks(self.wait_until_staged)
        self._tries: Counter[int] = Counter()
        self._thread = Worker("shardckpt-save")
        self._copier = Worker("shardckpt-copy")
        self._closed = False

    @property
    def last(self) -> PendingSave | None:
        """The save that was started last."""
        return self._flights.last

    def under_way(self) -> list[PendingSave]:
        """The saves that are not over yet, in order."""
        return self._flights.under_way()

    def start(self, step: int, take_parts: Callable[[], Sequence[Part]], *, options: SaveOptions) -> PendingSave:
        """Begin to save; returns when what training may change next is safe. What it does about earlier saves that are
        still under way is said by the policy.

        An error of this rank's state is raised here at once, and on the other ranks by their `PendingSave`.
        """
        work = self._new(step, options.deadline)
        skipped: CheckpointError | None = None
        with work.pending.stalling():
            try:
                skipped = self._flights.make_room(work.pending.step, self._policy)
                _raise(skipped)
                work.stager = self._flights.memory()
                with uncollected():
                    self._stage_now(work, take_parts(), options)
            except BaseException as error:
                work.error = error
            here = work.error  # what other threads run into from now on comes up in the `PendingSave`
            self._begin_copy(work)
            self.finish(work)
            if options.staging == "none" and here is None:
                self._hold(work.pending)
        if here is not None and here is not skipped:
            work.pending.mark_seen()
            raise here
        return work.pending

    def open(self, step: int) -> Work:
        """Make room for a checkpoint that is put together call by call. Waits for an earlier save to be written."""
        work = self._new(step)
        self.drain()
        work.stager = self._flights.memory()
        work.attempt = self._committer.attempt(work)
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
        self._flights.add(work)
        saving = self._thread.submit(partial(self._committer.run, work))
        work.give_up_save = partial(self._thread.give_up, saving)
        saving.add_done_callback(partial(_ended, work))
        return work.pending

    def abort(self, work: Work, reason: str) -> None:
        """Give the checkpoint up. Ranks that go on with it, as they do not know, fail as soon as they next talk."""
        if work.pending.done():
            return
        error = CheckpointSaveError(f"step {work.pending.step} was not saved: {reason}", step=work.pending.step)
        with suppress(CheckpointError):
            self._jointly(work, lambda: self._agree(work, lambda: _raise(error), "abort", timeout=_FAREWELL))

    def _new(self, step: int, deadline: timedelta | None = None) -> Work:
        if self._closed:
            raise CheckpointSaveError(f"step {step} was not saved: the manager is closed already", step=step)
        try:
            step_folder(step := operator.index(step))
        except (ValueError, TypeError) as error:
            raise InvalidStateError(f"{step!r} cannot be saved as a step: {error}") from error
        scope = f"save/{step}/{self._tries[step]}"
        self._tries[step] += 1
        self._tell(SaveStarted, step)
        return Work(PendingSave(step, self._tell), scope, time.perf_counter(), Limit.of(self.timeout, deadline))

    def _prefix(self, work: Work) -> str:
        assert work.attempt is not None
        return work.attempt.prefix

    def _agree(self, work: Work, act: Callable[[], object], phase: str, *, timeout: timedelta | None = None) -> None:
        together(self._gang, act, phase=phase, timeout=timeout or self.timeout, step=work.pending.step)

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
        self._flights.drain()

    def of_step(self, step: int) -> PendingSave | None:
        """The save of that step that is under way, or was the last one."""
        return self._flights.of_step(step)

    def wait_until_staged(self) -> None:
        """Hold whoever wants to change parameters until all copies are done. Any thread may call."""
        self._flights.wait_until_staged()

    def close(self) -> None:
        """Let the save under way end, then give everything back. Raises nothing."""
        self._closed = True
        self._thread.close()
        self._copier.close()
        self._hooks.remove()
        self._flights.close()

    def _stage_now(self, work: Work, parts: Sequence[Part], options: SaveOptions) -> None:
        work.options = options
        check_metadata(options.metadata)
        frozen = frozen_names(parts, options.frozen)
        terms: dict[str, Any] = {"model_key": options.model_key, "replicated": options.replicated}
        work.plan = self._planner.plan(parts, frozen=frozen, **terms)
        work.staging = work.stager.prepare(work.plan, rank=self._at.rank, windowed=options.staging == "none")
        work.pending.report.nbytes = work.staging.nbytes
        memory = memory_of_optimizers(parts) if options.staging == "overlap" else frozenset()
        work.later = (lambda tensor: tensor.data_ptr() in memory) if memory else nothing
        if options.verify:
            work.staging.note()
        now = (lambda tensor: not work.later(tensor)) if memory else everything
        work.staging.copy_now(now, and_wait=options.staging != "overlap")
        self._hooks.install(parts)

    def _begin_copy(self, work: Work) -> None:
        copying = self._copier.submit(partial(self._stage_later, work))
        work.give_up_copy = partial(self._give_up_copy, work, copying)
        copying.add_done_callback(partial(_copied, work))

    def _stage_later(self, work: Work) -> None:
        """The copies that training may overlap with, on the copying thread. Training is not held longer than this."""
        try:
            if work.error is None and work.staging is not None:
                with work.pending.report.phase("stage"):
                    work.staging.copy_later(work.later, on_queued=work.pending.mark_queued)
        except BaseException as error:
            work.error = error
        finally:
            work.pending.mark_staged()

    def _give_up_copy(self, work: Work, copying: Future[None]) -> None:
        """The copy takes too long: training goes on and will change what is being copied, so the save must fail."""
        work.error = work.error or TimeoutError("copying the state took too long")
        work.stager.forsake()
        self._copier.give_up(copying)
        work.pending.mark_staged()

    def _hold(self, pending: PendingSave) -> None:
        """Until it is over: nothing is copied. Whoever is interrupted may change the state, and it must not go on."""
        try:
            pending.wait()
        except BaseException:
            pending.cancel()
            raise


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def _copied(work: Work, future: Future[None]) -> None:
    """Also where the thread was ended in the middle of the copy."""
    work.error = work.error or future.exception()
    work.pending.mark_staged()


def _ended(work: Work, future: Future[None]) -> None:
    """Also where the thread was ended in the middle of the save, or was given up: then that is how it went."""
    error = future.exception()
    if error is None:
        return
    if work.lease.may_be_in_force:
        error = CommitUnknownError(f"step {work.pending.step} may or may not be saved: {error}", step=work.pending.step)
    work.pending.fail(as_save_error(work.error or error, work.pending.step))
