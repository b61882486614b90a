"""Which step to load: the newest good one, the best, one that is named, or one of another run."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.events.stream import EventStream
from shardckpt.engine.garbage import uncollected
from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.engine.pending import CheckpointInfo
from shardckpt.engine.save import Saver
from shardckpt.errors import CheckpointNotFoundError, GangError, InvalidOperationError
from shardckpt.format.layout import parse_step
from shardckpt.format.manifest import Manifest
from shardckpt.manager.finding import Finder, ModelOnlyError, check_asks_for_model_only
from shardckpt.manager.talk import Talk
from shardckpt.run.catalog import Catalog
from shardckpt.run.history import History
from shardckpt.run.registry.earlier import set_aside
from shardckpt.state import Part, StateReader
from shardckpt.storage.base import Storage
from shardckpt.storage.objects.secrecy import redact
from shardckpt.storage.open import open_storage

_log = logging.getLogger(__name__)

Which: TypeAlias = "bool | int | str | os.PathLike[str]"
Overwrite: TypeAlias = Literal["error", "go on", "set aside"]
_Load: TypeAlias = Callable[..., CheckpointInfo]
_NAMED = ("latest", "best")


class ResumingFace(ABC):
    """`resume`, `load`, `steps`, `latest`. All are called by all ranks, in the same order, on the training's thread."""

    _storage: Storage
    _storage_options: Mapping[str, object] | None
    _at: Coordinates
    _catalog: Catalog
    _events: EventStream
    _saver: Saver
    _reader: StateReader
    _talk: Talk
    _finder: Finder
    _history: History

    @abstractmethod
    def get_step_numbers(self) -> list[int]:
        """The committed steps, in order."""

    def resume(
        self,
        state: MutableMapping[str, Any],
        which: Which = True,
        *,
        policy: LoadPolicy | None = None,
        allow_fresh_start: bool = False,
        overwrite: Overwrite = "error",
    ) -> CheckpointInfo | None:
        """Load the newest step that is good on all ranks, or another one; None if the run has no step at all.

        A damaged step is passed over, and the log and the result say why; so is one of the model alone, if the state
        has more. If there are steps but none is good, that is an error and no silent fresh start, unless
        `allow_fresh_start`.

        Args:
            which: True or "latest"; "best", by the score, or the metric of the `KeepBest` of `keep`, of steps that have
                one; the number of a step, which must be good; the path or URL of another run, of which the newest good
                step is taken, or of a step of one (".../step_100"); False: a fresh start.
            overwrite: for a fresh start where the run has steps. "error"; "go on": they stay, and of steps of the same
                number the new one takes the place; "set aside": they are moved into a folder of the run, from which
                they can be loaded (on file systems).
        """
        self._saver.drain()  # a save under way is a step by the time that steps are looked for
        if which is False:
            self._start_afresh(overwrite)
            return None
        load = partial(self._load, state=state, policy=policy or LoadPolicy())
        if isinstance(which, int) and which is not True:
            return self._resumed(load(which, finder=self._finder), "asked for by its number")
        if isinstance(which, os.PathLike) or (isinstance(which, str) and which not in _NAMED):
            return self._from_elsewhere(os.fspath(which), load)
        if which == "best":
            metric, steps = self._best_first()
            return self._first_good(steps, load, reason=f"the best by {metric}", fresh=allow_fresh_start)
        newest = self._finder.newest_first()
        return self._first_good(newest, load, reason="the newest", fresh=allow_fresh_start)

    def _first_good(
        self, steps: Iterable[int], load: _Load, *, reason: str, fresh: bool, finder: Finder | None = None
    ) -> CheckpointInfo | None:
        load = partial(load, finder=finder or self._finder, unasked=True)
        found = (finder or self._finder).first_good(steps, load, fresh=fresh)
        if found is None:
            _log.info("nothing is resumed: there is no step, or none that is good")
            return None
        info = found[1]
        passed = f" of the good ones, {len(info.skipped)} passed over" if info.skipped else ""
        return self._resumed(info, f"{reason}{passed}", here=finder is None)

    def _resumed(self, info: CheckpointInfo, reason: str, *, here: bool = True) -> CheckpointInfo:
        if here:
            self._history.protect(info.step, "the step that was resumed from")
        if self._at.rank == 0:
            _log.info("resumed from step %d in %s: %s", info.step, info.url, reason)
        return replace(info, reason=reason)

    def _best_first(self) -> tuple[str, list[int]]:
        """The metric, and the steps that have it, the best first. There may be no step at all."""
        self._talk.enter("best")
        metric, steps, count = self._talk.from_rank_0(self._history.best_first, "find the best")
        if count and not steps:
            raise CheckpointNotFoundError(
                f"none of the {count} steps in {self._storage.url} has the metric {metric!r}, so none is the best: "
                "resume from the newest, or give them one with save_score or save_metrics"
            )
        return metric, steps

    def _from_elsewhere(self, where: str, load: _Load) -> CheckpointInfo:
        root, step = split_step(where)
        options = self._storage_options if "://" in root else None
        storage = open_storage(root, storage_options=options)
        try:
            catalog = Catalog(storage)
            finder = Finder(storage, catalog, self._talk, self._at, self._events.tell)
            if step is not None:
                return self._resumed(load(step, finder=finder), "asked for by its place", here=False)
            reason = "the newest of the run that was asked for"
            info = self._first_good(finder.newest_first(), load, reason=reason, fresh=False, finder=finder)
        finally:
            storage.close()
        if info is None:
            raise CheckpointNotFoundError(
                f"there is no checkpoint in {redact(where)}: give True, 'latest', 'best', a step, or the path or URL "
                "of a run or of a step"
            )
        return info

    def _start_afresh(self, overwrite: Overwrite) -> None:
        steps = self.steps()
        if not steps:
            return
        what = (
            f"a fresh start was asked for, and {self._storage.url} has {len(steps)} steps, the last of them {steps[-1]}"
        )
        if overwrite == "error":
            raise InvalidOperationError(
                f"{what}: take another root, resume, or say what is to become of them with overwrite="
            )
        if overwrite == "set aside":
            self._talk.enter("set aside")
            folder = self._talk.from_rank_0(self._set_aside, "set the steps aside")
            what = f"{what}: they are in {folder} now"
        if self._at.rank == 0:
            _log.warning("%s", what)

    def _set_aside(self) -> str:
        folder = set_aside(self._catalog)
        self._history.relink()
        return folder

    def load(self, step: int, state: MutableMapping[str, Any], *, policy: LoadPolicy | None = None) -> CheckpointInfo:
        """Load that step into the state: all that the policy says on all ranks, or nothing on any."""
        return self._load(step, state=state, policy=policy or LoadPolicy(), finder=self._finder)

    def _load(
        self, step: int, *, state: MutableMapping[str, Any], policy: LoadPolicy, finder: Finder, unasked: bool = False
    ) -> CheckpointInfo:
        self._saver.drain()
        self._talk.enter(f"load/{step}", step=step)
        with uncollected():
            folder, manifest = finder.record(step)
            parts = self._take_apart(state, manifest, policy, unasked=unasked)
        with finder.loading(folder, manifest) as loader:
            loader.load(parts, policy)
        return replace(finder.info(folder, manifest), left=dict(loader.left))

    def _take_apart(
        self, state: MutableMapping[str, Any], manifest: Manifest, policy: LoadPolicy, *, unasked: bool = False
    ) -> list[Part]:
        def take_apart() -> list[Part]:
            parts = self._reader.take_apart(state, for_loading=True)
            if unasked or policy.missing == "error":
                check_asks_for_model_only(parts, manifest, policy.selection)
            return parts

        try:
            return self._talk.together(take_apart, "take the state apart", step=manifest.step)
        except GangError as error:
            failure = next((f for f in error.failures.values() if f.kind == ModelOnlyError.__name__), None)
            if failure is None:
                raise
            raise ModelOnlyError(failure.message, step=manifest.step) from error

    def steps(self) -> list[int]:
        """The committed steps, in order. Rank 0 looks, all are told the same."""
        return self.get_step_numbers()

    def latest(self) -> int | None:
        """The newest committed step, whether it is sound or not; None if there is none."""
        return next(self._finder.newest_first(), None)


def split_step(where: str) -> tuple[str, int | None]:
    """The run, and the step in it if the place ends in the folder of one."""
    root, _, name = where.rstrip("/").rpartition("/")
    step = parse_step(name)
    return (where, None) if step is None else (root or ("/" if where.startswith("/") else "."), step)
