"""CheckpointManager: live objects in, live objects out; saves in the background, resumes by itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any

from shardckpt.engine.background.manners import Manners
from shardckpt.engine.background.policy import SavePolicy
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.events.stream import EventStream
from shardckpt.engine.patience import within
from shardckpt.engine.pending import CheckpointInfo, PendingSave
from shardckpt.engine.save import Saver
from shardckpt.engine.saving.work import SaveOptions
from shardckpt.engine.writing.process import in_other_process
from shardckpt.errors import CheckpointError
from shardckpt.gang.gangs import Gangs
from shardckpt.manager.finding import Finder
from shardckpt.manager.planning import PlanningFace
from shardckpt.manager.sharing.check import check_shared
from shardckpt.manager.steps.keeping import KeepingFace
from shardckpt.manager.steps.resuming import ResumingFace
from shardckpt.manager.steps.scheduling import SchedulingFace
from shardckpt.manager.steps.telling import TellingFace
from shardckpt.manager.stopping import StoppingFace
from shardckpt.manager.talk import Talk
from shardckpt.manager.tally import Tally
from shardckpt.manager.transactional import TransactionalFace
from shardckpt.run.catalog import Catalog
from shardckpt.run.history import History
from shardckpt.run.registry.one import Journal, Run
from shardckpt.run.retention import KeepAll, Policy
from shardckpt.state import Part, StateReader
from shardckpt.storage.base import Storage
from shardckpt.storage.open import open_storage

_log = logging.getLogger(__name__)

_GRACE = timedelta(hours=1)
"""How long an attempt of somebody else must lie still, at least, before it is taken for dead."""


class CheckpointManager(
    TransactionalFace, ResumingFace, PlanningFace, KeepingFace, SchedulingFace, StoppingFace, TellingFace
):
    """Saves, finds and loads the checkpoints of one run.

    Made by all ranks of the job at once, on the training's thread; all its methods are called by all ranks, in the
    same order, on that thread. `save` works on in the background; nothing here ever uses the training's groups.

    >>> import tempfile, torch
    >>> model = torch.nn.Linear(2, 2)
    >>> with CheckpointManager(tempfile.mkdtemp()) as checkpoints:
    ...     _ = checkpoints.save(1, {"model": model})
    ...     checkpoints.wait()
    ...     checkpoints.steps()
    [1]

    Args:
        root: where the run lies: a path, any URL that fsspec opens, a `Storage`, or a `Run` of `Runs`. It must be one
            place for all ranks: the first method that looks there raises `RootNotSharedError` on all if it is not.
        gangs: the processes that act together; found from the environment if not given.
        keep: which steps to keep (`KeepLast(3) | KeepBest(2)`); all, if not given. Pruned after each commit.
        timeout: how long a rank waits for its peers in one phase of a save or load before it gives up.
        saving: how the state is copied, and what becomes of a save that comes while another is under way; see
            `SavePolicy`. If not given, it overlaps with training, and a save waits for the one before.
        manners: how considerate the writing is of the device and the processor; see `Manners`. As fast as it can be, if
            not given.
        tolerate: how many saves in a row may fail before `save` raises the failure of the last one; up to then a
            failure is logged, and raised by whoever asks for its result, by `wait` and at the end of the `with`.
        storage_options: for fsspec; never logged or recorded.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage | Run,
        gangs: Gangs | None = None,
        *,
        keep: Policy | None = None,
        timeout: timedelta = timedelta(minutes=30),
        saving: SavePolicy | None = None,
        manners: Manners | None = None,
        tolerate: int = 2,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        self._gangs = gangs = gangs or Gangs.from_env()
        run = root if isinstance(root, Run) else None
        if isinstance(root, Run):
            storage_options = root.storage_options
            root = root.root
        self._storage_options = storage_options
        self._storage = _storage(root, storage_options)
        self._owns_storage = isinstance(root, (str, os.PathLike))
        self._at = Coordinates.of(gangs)
        talking = gangs.fork("load").root
        self._talk = Talk(
            talking, timeout=timeout, at_first=partial(check_shared, talking, self._storage, timeout=timeout)
        )
        self._saving = saving or SavePolicy()
        self._tally = Tally(tolerate=tolerate)
        self._reader = StateReader()
        self._catalog = Catalog(self._storage)
        self._policy = keep or KeepAll()
        self._events = EventStream(self._at.rank)
        self._history = History(self._catalog, self._policy, grace=max(2 * timeout, _GRACE), **self._tellers())
        self._history.journal = Journal(self._storage) if run is not None else None
        self._save_gang = gangs.fork("save").root
        terms: dict[str, Any] = {"timeout": timeout, "policy": self._saving, "on_commit": self._after_commit}
        self._written: Storage = self._storage
        if manners is not None and manners.process:
            self._written = in_other_process(self._storage, root, storage_options, manners)
            manners = None  # of this process, which does not write
        terms |= {"manners": manners, "tell": self._events.tell}
        self._saver = Saver(self._written, self._save_gang, self._at, **terms)
        self._finder = Finder(self._storage, self._catalog, self._talk, self._at, self._events.tell)
        self._open = None

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._give_up("the program left the `with` before commit_checkpoint()")
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            _log.error("besides, %s", failure)

    @property
    def storage(self) -> Storage:
        """Where the run lies; for what goes beside its steps (`cc/`). Its `url` has no credentials."""
        return self._storage

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        replicated: Collection[str] = (),
        frozen: Collection[str] = (),
        metadata: Mapping[str, Any] | None = None,
        model_key: str = "model",
        deadline: timedelta | None = None,
    ) -> PendingSave:
        """Save the state as it is now. Returns when what training may change next is safe, not when it is written.

        Parameters and optimizer state of optimizers in the state are copied while training goes on; the next
        `optimizer.step()` waits for the copy by itself, other changes of parameters go under `guard()`. An earlier
        save that is still being written is waited for. (`SavePolicy` has other ways.)

        Args:
            step: the training step; saving a step again replaces it at the commit.
            state: modules, optimizers, anything with `state_dict`/`load_state_dict`, tensors and plain values, in
                nested dicts. `RngState()` stands for all random streams.
            replicated: top-level keys (or "*") that all data-parallel ranks hold alike: stored once.
            frozen: names of what does not change from step to step (`model.base`: the parameters below it; "*": all
                that require no gradient): stored once per run, and never copied. It must not change during the save;
                what has changed by the next one is stored anew.
            metadata: JSON of yours, kept in the record.
            model_key: the key of the model, whose state goes to `model.<r>.pt`.
            deadline: if it is not committed this long after the call, it fails; the same on all ranks.
        """
        self._none_open("save")
        options = SaveOptions(model_key, replicated, frozen, metadata or {}, self._saving.staging)
        options = replace(options, verify=self._saving.verify_copies, deadline=self._in_budget(deadline))
        return self._begin(partial(self._saver.start, step, options=options), partial(self._reader.take_apart, state))

    def _begin(
        self, start: Callable[[Callable[[], Sequence[Part]]], PendingSave], take_apart: Callable[[], Sequence[Part]]
    ) -> PendingSave:
        """Too many failures before are raised as an error of this save, so that ranks that do not know of them yet are
        told. Where saves wait for those before, all ranks know of the same: those that had to end to make room."""
        newest = self._saving.in_flight - 1 if self._saving.when_busy == "wait" else 0
        due: list[CheckpointError] = []

        def account_and_take() -> Sequence[Part]:
            error = self._tally.account(newest=newest)
            if error is not None:
                due.append(error)
                raise error
            return take_apart()

        before = self._saver.last
        try:
            return start(account_and_take)
        finally:
            begun = self._saver.last
            if begun is not None and begun is not before and not due:
                self._tally.add(begun)

    def wait(self) -> None:
        """Wait for the saves under way; raises a failure that nobody has looked at yet."""
        self._saver.drain()
        error = self._tally.unseen()
        if error is not None:
            raise error

    @property
    def skipped(self) -> int:
        """How many of the saves that are over were skipped, or given up for a newer one, as `saving` says."""
        return self._tally.skipped

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around anything but `optimizer.step()` that changes parameters (EMA, manual updates): waits for the copy."""
        self._saver.wait_until_staged()
        yield

    def close(self) -> None:
        """Let the save under way end and give everything back; raises a failure that nobody has looked at yet."""
        try:
            self._give_up("the manager was closed before commit_checkpoint()")
            self.wait()
        finally:
            self._stop_watching()
            self._saver.close()
            if self._written is not self._storage:
                self._written.close()
            self._save_gang.close()
            self._talk.close()
            self._stop_telling()
            if self._owns_storage:
                self._storage.close()

    def _account_for_last(self) -> None:
        self._saver.drain()
        error = self._tally.account()
        if error is not None:
            raise error

    def _after_commit(self, info: CheckpointInfo, pending: PendingSave) -> None:
        """On the save thread of every rank; rank 0 logs, notes the score and prunes."""
        if self._at.rank == 0:
            report = pending.report
            # The next save is written by this thread.
            terms: dict[str, Any] = {"created": info.created, "nbytes": info.nbytes, "placed": pending.placed}
            work = partial(self._history.committed, info.step, **terms)
            deleted = within(self._talk.timeout, work, what="pruning")
            _log.info(
                "step %d committed: %.2f GB in %.2f s (%.2f GB/s), training held for %.3f s%s",
                info.step, info.nbytes / 1e9, report.total_s, report.rate / 1e9, report.stall_s,
                f", deleted steps {deleted}" if deleted else "",
            )  # fmt: skip


def _storage(root: str | os.PathLike[str] | Storage, options: Mapping[str, object] | None) -> Storage:
    if isinstance(root, (str, os.PathLike)):
        return open_storage(root, storage_options=options)
    return root
