"""What rank 0 does for a run beside its saves: scores that wait for their commit, protected steps, pruning."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol

from shardckpt.errors import CheckpointError
from shardckpt.format.layout import METRICS
from shardckpt.format.layout import SCORE as SCORE_FILE
from shardckpt.run.catalog import Catalog
from shardckpt.run.keeping.links import update_links
from shardckpt.run.keeping.metrics import encode_metrics, read_metrics, write_metrics
from shardckpt.run.leftovers import DeadAttempts
from shardckpt.run.prune import Deleted, Fate, fates, plan_retention, retain
from shardckpt.run.registry.one import Journal
from shardckpt.run.retention import SCORE, Policy, prefers_lower, yardstick
from shardckpt.run.scores import decode_score, encode_score, read_scores, write_score
from shardckpt.run.shared.sweeping import tidy_blobs
from shardckpt.storage.base import LinkingStorage

_log = logging.getLogger(__name__)

_LEFT = "its record is damaged: a person is to look at it"


class UnderWay(Protocol):
    """A save, as far as it is known here. Any thread."""

    def done(self) -> bool:
        """Whether it is over."""
        ...

    def give(self, name: str, content: bytes) -> None:
        """Have a small file put into the checkpoint beside its record, if that is not yet there."""
        ...


class History:
    """One per manager. `committed` runs on the save thread of rank 0, all else on the training's thread there."""

    def __init__(
        self,
        catalog: Catalog,
        policy: Policy,
        *,
        grace: timedelta,
        on_deleted: Callable[[Deleted], None] = lambda gone: None,
        on_measured: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
        held: Callable[[], Mapping[int, str]] = dict,
    ) -> None:
        """`held`: steps that must not be pruned now, and why; asked before each pruning."""
        self._catalog = catalog
        self.journal: Journal | None = None
        """Where the run's history is put down, if the run has one."""
        self.links = False
        """Whether links lead to the newest step and the best, where the storage has any."""
        self._on_deleted = on_deleted
        self._on_measured = on_measured
        self._held = held
        self._leftovers = DeadAttempts(catalog, grace=grace)
        self._policy = policy
        self._rule = yardstick(policy)
        self._due: dict[int, float] = {}
        self._noted: set[int] = set()
        """Steps that got a score while they were being saved, not by `begin_checkpoint`."""
        self._due_metrics: dict[int, dict[str, float]] = {}
        self._protected: dict[int, str] = {}
        self._models: set[int] = set()
        """Steps of which a policy has left the model alone."""
        self._lock = threading.Lock()
        self._linking = threading.Lock()
        self._scoring = threading.Lock()
        """Held while a score is written: the older one never comes last."""

    @property
    def prefers_lower(self) -> bool:
        """Whether the policy of the run takes lower scores for better ones."""
        return prefers_lower(self._policy)

    def protect(self, step: int, reason: str) -> None:
        """Never prune this step while the job lives."""
        with self._lock:
            self._protected[step] = reason

    def note(self, step: int, score: float, *, save: UnderWay) -> bool:
        """Have a score put into the checkpoint of a save, or written after its commit, if it comes too late for that.
        False if the save is over: then it must be written now."""
        content = encode_score(score)
        with self._lock:
            if save.done():
                return False
            self._due[step] = score
            self._noted.add(step)
            save.give(SCORE_FILE, content)
            return True

    def write_score(self, step: int, score: float) -> None:
        """Give a committed step its score. On rank 0."""
        with self._scoring:
            with self._lock:
                self._due.pop(step, None)  # an older one, that was to be written after the commit
            write_score(self._catalog.storage, self._catalog.entry(step), score=score)
        self._measured(step, {SCORE: float(score)})
        self.relink()

    def measure(self, step: int, metrics: dict[str, float], *, save: UnderWay | None) -> None:
        """Give a step metrics: now, or, while it is being saved, with the commit or after it."""
        with self._lock:
            if save is not None and not save.done():
                due = self._due_metrics[step] = {**self._due_metrics.get(step, {}), **metrics}
                save.give(METRICS, encode_metrics(due))
                return
        self._write_metrics(step, metrics)

    def _write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        with self._scoring:
            write_metrics(self._catalog.storage, self._catalog.entry(step), metrics=metrics)
        self._measured(step, metrics)
        self.relink()

    def _measured(self, step: int, metrics: dict[str, float]) -> None:
        if self.journal is not None:
            self.journal.measured(step, metrics)
        self._on_measured(step, metrics)

    def plan(self, policy: Policy | None) -> list[Fate]:
        """What this policy, or the run's own, would make of each step. Only looks."""
        policy = policy or self._policy
        return fates(plan_retention(self._catalog, policy, protected=self._staying(), best_by=self._rule), policy)

    def apply(self, policy: Policy | None) -> list[Fate]:
        """Do it, and say what has become of each step: those that are gone are not kept."""
        planned = self.plan(policy)
        self.retain(policy or self._policy, spare_best=True)
        there = set(self._catalog.steps())  # the save thread may have pruned meanwhile, too
        return [
            replace(fate, kept=True, reason=_LEFT)
            if fate.step in there and not (fate.kept or fate.model_kept)
            else fate
            for fate in planned
        ]

    def best_first(self) -> tuple[str, list[int], int]:
        """The metric by which the run's policy compares (the score, of which more is better, if it does not), the steps
        that have it, the best first, and how many steps there are in all. On rank 0."""
        rule = self._rule
        entries = self._catalog.entries()
        if rule.metric == SCORE:
            known = dict(read_scores(self._catalog.storage, entries).by_step)
        else:
            measured = read_metrics(self._catalog.storage, entries).items()
            known = {step: found[rule.metric] for step, found in measured if found and rule.metric in found}
        return rule.metric, rule.ranking(known), len(entries)

    def retain(self, policy: Policy, *, preserve_model: bool = False, spare_best: bool = False) -> list[Deleted]:
        """Delete what this policy does not keep, whatever the run's own policy is; see `shardckpt.run.prune.retain`.
        With `spare_best` the step stays that the run's own policy takes for the best.

        While no save is under way, for a step that is being replaced must not be deleted.
        """
        protected, best_by = self._staying(), self._rule if spare_best else None
        terms: dict[str, Any] = {"protected": protected, "best_by": best_by, "models": self._models}
        return self._told(retain(self._catalog, policy, preserve_model=preserve_model, **terms))

    def _staying(self) -> dict[int, str]:
        """The steps that stay now, whatever a policy says, and why."""
        with self._lock:
            return {**self._held(), **self._protected}

    def committed(
        self, step: int, *, created: str = "", nbytes: int = 0, placed: Mapping[str, bytes] | None = None
    ) -> list[int]:
        """After a commit: note it, write the score and metrics that are not among what was `placed` with the record,
        prune, and give the deleted steps.

        What goes wrong here is logged: the step is committed all the same, and the next commit prunes again.
        """
        protected = {**self._staying(), step: "the step that was just saved"}
        self._models.discard(step)
        if self.journal is not None:
            self.journal.committed(step, created=created, nbytes=nbytes, metrics={})
        placed = placed or {}
        self._write_due(step, placed.get(SCORE_FILE))
        self._write_due_metrics(step, placed.get(METRICS))
        self.relink()
        try:
            self._leftovers.tidy()
        except Exception:
            _log.exception("step %d is committed, but the leftovers of other saves were not looked at", step)
        try:
            terms: dict[str, Any] = {"protected": protected, "best_by": self._rule, "models": self._models}
            deleted = retain(self._catalog, self._policy, **terms)
            return [gone.step for gone in self._told(deleted) if not gone.model_kept]
        except Exception:  # a policy of the user's may raise anything
            _log.exception("step %d is committed, but older steps were not pruned", step)
            return []

    def _write_due(self, step: int, placed: bytes | None) -> None:
        """The score that was given while the step was being saved, if no newer one has been written since. `placed`:
        the one that is there since the commit."""
        with self._scoring:
            with self._lock:
                score, noted = self._due.pop(step, None), step in self._noted
                self._noted.discard(step)
            if score is None and (noted or placed is None):
                return
            if score is None and placed is not None:
                score = decode_score(placed)
            assert score is not None
            try:
                if encode_score(score) != placed:
                    write_score(self._catalog.storage, self._catalog.entry(step), score=score)
            except Exception:
                _log.exception("step %d is committed, but its score was not written", step)
                return
        self._measured(step, {SCORE: score})

    def _write_due_metrics(self, step: int, placed: bytes | None) -> None:
        with self._lock:
            metrics = self._due_metrics.pop(step, None)
        try:
            if metrics is not None and encode_metrics(metrics) == placed:
                self._measured(step, metrics)
            elif metrics is not None:
                self._write_metrics(step, metrics)
        except Exception:
            _log.exception("step %d is committed, but its metrics were not written", step)

    def deleted(self, step: int, *, model_kept: bool) -> None:
        """Somebody has deleted this step, or reduced it to its model, by its name."""
        tidy_blobs(self._catalog.storage)
        self._told([Deleted(step, "asked for by its number", 0, model_kept=model_kept)])

    def relink(self) -> None:
        """Have the links lead where they should. What goes wrong is logged."""
        if not self.links or not isinstance(self._catalog.storage, LinkingStorage):
            return
        try:
            with self._linking:
                _, steps, _ = self.best_first()
                update_links(self._catalog, best=steps[0] if steps else None)
        except CheckpointError as error:
            _log.warning("the links to steps are not up to date: %s", error)

    def _told(self, deleted: list[Deleted]) -> list[Deleted]:
        for gone in deleted:
            self._on_deleted(gone)
        if deleted:
            self.relink()
        return deleted
