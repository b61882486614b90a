"""What the save thread does with a save that is staged: write it, exchange receipts, commit. On every rank."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from shardckpt.engine.background.lease import Watch
from shardckpt.engine.background.manners import Manners
from shardckpt.engine.background.worker import is_ending
from shardckpt.engine.carry import carry
from shardckpt.engine.committing.commit import check_kept, check_room
from shardckpt.engine.committing.receipts import TableBook, describe_own
from shardckpt.engine.committing.transaction import Transaction
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.events.kinds import Written
from shardckpt.engine.patience import within
from shardckpt.engine.pending import CheckpointInfo, PendingSave
from shardckpt.engine.saving.plan import plan_save
from shardckpt.engine.saving.stage import Staging
from shardckpt.engine.saving.work import Work, as_save_error
from shardckpt.engine.saving.write import OwnFiles, Receipt, Sealed, write_files
from shardckpt.engine.writing.blobs import Blobs
from shardckpt.format.layout import step_folder
from shardckpt.gang.base import Gang
from shardckpt.storage.base import Storage
from shardckpt.storage.retrying import retries_of
from shardckpt.storage.transfer.pacing import Pacer

_log = logging.getLogger(__name__)


class Committer:
    """Takes saves from staged to committed, one after the other. One per `Saver`; used on its save thread."""

    def __init__(
        self,
        storage: Storage,
        gang: Gang,
        coordinates: Coordinates,
        *,
        on_commit: Callable[[CheckpointInfo, PendingSave], None],
        manners: Manners,
    ) -> None:
        self._storage = storage
        self._gang = gang
        self._at = coordinates
        self._on_commit = on_commit
        self._manners = manners
        self._pacer = None if manners.rate is None else Pacer(manners.rate)
        self._book = TableBook()
        self._given_up: deque[str] = deque(maxlen=8)
        """The scopes of saves whose thread hung, the newest last."""
        self._blobs = Blobs(storage)

    def attempt(self, work: Work) -> Transaction:
        """A new attempt to commit it."""
        terms: dict[str, Any] = {"step": work.pending.step, "limit": work.limit, "lease": work.lease}
        terms |= {"began": work.pending.report.began, "given_up": self._given_up}
        return Transaction(self._storage, self._gang, self._book, **terms)

    def run(self, work: Work) -> None:
        """Never raises: what happens ends in the `PendingSave`."""
        with Watch(work.lease, work.limit, partial(self._give_up, work)) as watch:
            self._run(work, watch)

    def _give_up(self, work: Work) -> None:
        """On the watching thread: the save thread hangs, and is left behind."""
        self._given_up.append(work.scope)  # the others may wait for it there longer than this rank does
        work.pending.progress.cancel()
        work.stager.forsake()
        work.give_up_save()

    def _run(self, work: Work, watch: Watch) -> None:
        pending = work.pending
        attempt = work.attempt or self.attempt(work)
        try:
            info = self._write_and_commit(work, attempt)
        except BaseException as error:
            work.error = error
            self._excuse(work, attempt, error)
            work.let_go()  # before it is over, and the next may use the same memory
            pending.fail(as_save_error(error, pending.step))
            if is_ending() and not pending.skipped:
                _log.error("at the end of the program: %s", pending.failure())
            return
        watch.committed()
        work.let_go()
        pending.report.total_s = time.perf_counter() - work.began
        pending.report.total_nbytes = info.nbytes
        pending.finish(info)
        try:
            self._on_commit(info, pending)
        except Exception:
            _log.exception("step %d is committed, but what was to be done after it failed", info.step)

    def _check_ready(self, work: Work) -> None:
        """Where all ranks meet, before anything is written: what went wrong here so far is raised."""
        if not work.pending.staged(work.limit.work):
            work.give_up_copy()
        if work.error is not None:
            raise work.error
        work.pending.progress.check()
        work.limit.check()

    def _excuse(self, work: Work, attempt: Transaction, error: BaseException) -> None:
        """This rank has failed (or its thread was ended) on the way to the others: they wait for it, and are told."""

        def tell() -> None:
            raise error

        if not attempt.has_met:
            with contextlib.suppress(BaseException):  # they raise it, too, and nothing else is lost
                attempt.begin(work.scope, tell)

    def _write_and_commit(self, work: Work, attempt: Transaction) -> CheckpointInfo:
        step, report, before = work.pending.step, work.pending.report, retries_of(self._storage)
        try:
            if work.attempt is None:
                with report.phase("meet"):
                    attempt.begin(work.scope, partial(self._check_ready, work))
            with report.phase("write"):
                work.uploads = attempt.begin_uploads(work.led)
                attempt.write(lambda prefix: self._write(work, prefix))
            with report.phase("commit"):
                attempt.compare(work.alike)
                assert work.plan is not None
                how: dict[str, Any] = {"model_key": work.options.model_key, "beside": work.pending.place}
                committed = attempt.commit(work.plan, work.options.metadata, **how)
        except BaseException:
            attempt.abandon()
            raise
        finally:
            report.retries = retries_of(self._storage) - before
            work.pending.others = attempt.others()
        report.slowest_rank, report.slowest_s = committed.slowest_rank, committed.slowest_s
        url = f"{self._storage.url.rstrip('/')}/{step_folder(step)}"
        metadata = dict(work.options.metadata)
        return CheckpointInfo(step, url, committed.nbytes, self._at.world_size, committed.created, metadata)

    def _write(self, work: Work, prefix: str) -> Receipt:
        if work.error is not None:
            raise work.error
        if work.plan is None or work.staging is None:  # no state, only files that are written already
            work.plan = plan_save((), self._at)
            work.staging = work.stager.prepare(work.plan, rank=self._at.rank)
        report, began = work.pending.report, time.perf_counter()
        try:
            put = partial(self._put, work, work.staging, prefix)
            sealed, own = within(work.limit.work, put, what="writing the files")
        except BaseException as error:
            if isinstance(error, TimeoutError) or not isinstance(error, Exception):  # whoever writes is left behind
                work.pending.progress.cancel()  # at its next part, if it ever comes to it
                work.stager.forsake()
            raise
        seconds = {"write": time.perf_counter() - began, "stage": report.stage_s}
        work.pending.tell(Written, report.step, seconds=seconds["write"], nbytes=report.nbytes)
        work.alike = work.staging.alike()
        receipt = describe_own(self._at, work.plan, sealed, (*own.files, *work.files), work.alike, seconds)
        return replace(receipt, phases=tuple(report.phases), parts=own.parts)

    def _put(self, work: Work, staging: Staging, prefix: str) -> tuple[list[Sealed], OwnFiles]:
        """In a thread of its own."""
        self._manners.behave()
        report = work.pending.report
        with report.phase("seal"):
            sealed = staging.seal()
        report.nbytes = sum(file.end - file.start for file in sealed)
        with report.phase("put"):
            pace: dict[str, Any] = {} if self._pacer is None else {"pace": self._pacer.pace}
            pace |= {"uploads": work.uploads, "blobs": self._blobs}
            if self._at.rank:
                check_room(self._storage, prefix)
            check_kept(self._storage, prefix, work.files)
            own = write_files(self._storage, prefix, sealed, work.pending.progress, **pace)
            report.nbytes -= own.reused_nbytes
            if self._at.rank == 0:
                own = replace(own, files=(*own.files, *carry(self._storage, prefix)))
        return sealed, own
