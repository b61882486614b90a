"""Pruning: delete the steps that a policy does not keep, or all of them but their models. Rank 0 only.

Usually in the save thread, after a commit; or on the training's thread, when the program asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shardckpt.errors import (
    CheckpointDamagedError,
    CheckpointDeleteError,
    CheckpointError,
    CheckpointLoadError,
    CheckpointNotFoundError,
)
from shardckpt.format.manifest import FileEntry, Manifest
from shardckpt.format.reduced import NoModelError
from shardckpt.run.catalog import Catalog, Entry, read_record
from shardckpt.run.deletion import delete_step, preserve_model
from shardckpt.run.keeping.metrics import read_metrics
from shardckpt.run.keeping.pins import pinned_steps
from shardckpt.run.requests import each
from shardckpt.run.retention import NOTHING, SCORE, Decision, KeepBest, Policy, StepFacts, decide
from shardckpt.run.scores import Scores, read_scores
from shardckpt.run.shared.sweeping import tidy_blobs
from shardckpt.storage.base import Storage

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Deleted:
    """A step that is gone, or of which only the model is left."""

    step: int
    reason: str
    nbytes: int
    """Of the files that went, as its record said; blobs, which other steps may refer to, are not counted."""
    model_kept: bool = False
    blobs: int = 0
    """How many blobs its record referred to, and no longer does."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a step, and why."""

    step: int
    kept: bool
    """As it is."""
    reason: str
    model_kept: bool = False
    """Whether its model stays, and the rest of it goes."""


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What becomes of the steps of a run."""

    steps: tuple[Fate, ...]
    deleted: tuple[Deleted, ...]
    applied: bool
    """Whether anything was to be deleted, or only told."""


def fates(decision: Decision, policy: Policy) -> list[Fate]:
    """Of every step that a decision speaks of, ascending."""
    stay = [Fate(step, True, reason) for step, reason in decision.kept.items()]
    go = [Fate(step, False, f"not kept by {policy}") for step in decision.doomed]
    half = [Fate(step, False, reason, model_kept=True) for step, reason in decision.reduced.items()]
    return sorted(stay + go + half, key=lambda fate: fate.step)


def retain(
    catalog: Catalog,
    policy: Policy,
    *,
    preserve_model: bool = False,
    protected: Mapping[int, str] = NOTHING,
    best_by: KeepBest | None = None,
    models: set[int] | None = None,
) -> list[Deleted]:
    """Delete what the policy does not keep, oldest first, as `plan_retention` says, and all but the model of what it
    keeps only that of.

    With `preserve_model` only all but the model is deleted of each; steps that are so already stay as they are, and
    those that have no model to be kept are left alone and logged.

    Put into `protected`, with a reason each: the step resumed from, and the step just saved, which is not the one with
    the highest number after going back to an earlier step. A doomed step whose record is damaged is left alone and
    logged: nothing proves any more that it is ours.

    `models`: steps that are known to have only their model, and need not be looked at; those that are found so are
    added.

    If deletions fail the others are still tried, and one `CheckpointDeleteError` names each failed step and its cause
    (its own `step` is the first of them). `CheckpointLoadError` if it cannot be told what is there; then nothing was
    deleted.
    """
    if policy.keeps_all:
        return []
    entries = catalog.entries()
    decision = _decide(catalog, policy, entries, protected, best_by)
    reason, deleted, errors = f"not kept by {policy}", list[Deleted](), dict[int, CheckpointError]()
    models, reduced = set() if models is None else models, dict(decision.reduced)
    for entry in (entry for entry in entries if entry.step in decision.doomed or entry.step in reduced):
        try:
            if entry.step in reduced and entry.step in models:
                continue
            if preserve_model or entry.step in reduced:
                done = _reduce(catalog, entry, reduced.get(entry.step, reason))
                models.add(entry.step)
            else:
                done = _delete(catalog, entry, reason)
        except CheckpointNotFoundError:
            _log.info("step %d is gone already", entry.step)
        except (CheckpointDeleteError, CheckpointLoadError) as error:
            if isinstance(error, CheckpointDamagedError) or isinstance(error.__cause__, NoModelError):
                _log.warning("step %d is not deleted although no rule keeps it: %s", entry.step, error)
            else:
                errors[entry.step] = error
        else:
            deleted += done
    if any(gone.blobs for gone in deleted):
        tidy_blobs(catalog.storage)
    if errors:
        raise _joined(errors, catalog.storage.url) from next(iter(errors.values()))
    return deleted


def plan_retention(
    catalog: Catalog, policy: Policy, *, protected: Mapping[int, str] = NOTHING, best_by: KeepBest | None = None
) -> Decision:
    """What `retain` would keep, and why, and what it would delete or reduce to its model. Only looks.

    Besides what `decide` keeps, these stay: the newest step that is whole by its record and the sizes of its files and
    has more than its model (if none has, the newest whole one), pinned ones, the best one by `best_by`, if that is
    given, and those whose score or metrics are to be compared and are damaged: they may be the best.
    """
    return _decide(catalog, policy, catalog.entries(), protected, best_by)


def _decide(
    catalog: Catalog,
    policy: Policy,
    entries: Sequence[Entry],
    protected: Mapping[int, str],
    best_by: KeepBest | None,
) -> Decision:
    scores = read_scores(catalog.storage, entries) if "score" in policy.uses else Scores()
    created = _times(catalog, entries) if "created" in policy.uses else {}
    metrics = read_metrics(catalog.storage, entries) if "metrics" in policy.uses else {}
    history = [
        StepFacts(e.step, created.get(e.step), scores.by_step.get(e.step), metrics=metrics.get(e.step) or {})
        for e in entries
    ]
    damaged = [step for step, found in metrics.items() if found is None]
    stay = dict.fromkeys(damaged, "its metrics cannot be read")
    stay |= dict.fromkeys(scores.damaged, "its score cannot be read") | dict(protected)
    decision = decide(policy, history, protected=stay)
    if not (decision.doomed or decision.reduced):
        return decision
    pinned = pinned_steps(catalog.storage)
    history = [replace(facts, pinned=facts.step in pinned) for facts in history]
    step, why = _resume_point(catalog, entries, protected)
    if step not in decision.kept:
        stay[step] = why
    stay |= _best(catalog, entries, decision.doomed, best_by) if best_by is not None else {}
    return decide(policy, history, protected=stay)


def _best(catalog: Catalog, entries: Sequence[Entry], doomed: Sequence[int], rule: KeepBest) -> dict[int, str]:
    """The best step, and what may be it, of those that would go. As long as none of these was measured: nothing else is
    looked at."""
    going, staying = ([entry for entry in entries if (entry.step in doomed) is gone] for gone in (True, False))
    values, damaged = _measured(catalog, going, rule)
    if values:
        values |= _measured(catalog, staying, rule)[0]
        best = rule.ranking(values)[0]
        damaged |= {best: f"the best by {rule.metric}: {values[best]}"} if best in doomed else {}
    return damaged


def _measured(catalog: Catalog, entries: Sequence[Entry], rule: KeepBest) -> tuple[dict[int, float], dict[int, str]]:
    """By step what is compared; and why that of others cannot be read."""
    if rule.metric == SCORE:
        scores = read_scores(catalog.storage, entries)
        return dict(scores.by_step), dict.fromkeys(scores.damaged, "its score cannot be read")
    found = read_metrics(catalog.storage, entries)
    values = {step: metrics[rule.metric] for step, metrics in found.items() if metrics and rule.metric in metrics}
    return values, {step: "its metrics cannot be read" for step, metrics in found.items() if metrics is None}


def _resume_point(catalog: Catalog, entries: Sequence[Entry], protected: Mapping[int, str]) -> tuple[int, str]:
    """The newest step that a job can go on from as far as its record and the sizes of its files tell, and why it stays;
    -1 if there is none. What is protected (it was just saved, or resumed from) is taken for whole."""
    only_model, not_whole = -1, -1
    for entry in reversed(entries):
        record = _sound_record(catalog, entry)
        if record is None:
            continue
        if entry.step not in protected and not _is_whole(catalog.storage, entry, record):
            not_whole = max(not_whole, entry.step)
        elif not record.model_only:
            return entry.step, "the newest whole one with more than its model"
        else:
            only_model = max(only_model, entry.step)
    if only_model >= 0:
        return only_model, "the newest whole one"
    return not_whole, "the newest one with a sound record"


def _is_whole(storage: Storage, entry: Entry, record: Manifest) -> bool:
    def is_there(file: FileEntry) -> bool:
        try:
            return storage.size(file.key_in(entry.folder)) == file.nbytes
        except FileNotFoundError:
            return False
        except OSError as error:
            what = f"cannot tell whether step {entry.step} in {storage.url} is whole: {error}; nothing was deleted"
            raise CheckpointLoadError(what, step=entry.step) from error

    return all(each(is_there, record.files))


def _times(catalog: Catalog, entries: Sequence[Entry]) -> dict[int, str]:
    records = each(lambda entry: _sound_record(catalog, entry), entries)
    return {record.step: record.created for record in records if record is not None}


def _sound_record(catalog: Catalog, entry: Entry) -> Manifest | None:
    try:
        return read_record(catalog.storage, entry)
    except (CheckpointDamagedError, CheckpointNotFoundError):
        return None


def _delete(catalog: Catalog, entry: Entry, reason: str) -> list[Deleted]:
    manifest = read_record(catalog.storage, entry)
    delete_step(catalog.storage, entry, manifest=manifest)
    nbytes = manifest.nbytes - manifest.shared_nbytes
    _log.info("deleted step %d, %d bytes: %s", entry.step, nbytes, reason)
    return [Deleted(entry.step, reason, nbytes, blobs=sum(bool(file.blob) for file in manifest.files))]


def _reduce(catalog: Catalog, entry: Entry, reason: str) -> list[Deleted]:
    """Nothing, if the step had only its model already."""
    reduced = preserve_model(catalog.storage, entry)
    if reduced is None:
        return []
    own = [file for file in reduced.doomed if not file.blob]
    nbytes, blobs = sum(file.nbytes for file in own), len(reduced.doomed) - len(own)
    return [Deleted(entry.step, reason, nbytes, model_kept=True, blobs=blobs)]


def _joined(errors: Mapping[int, CheckpointError], url: str) -> CheckpointDeleteError:
    causes = "".join(f"\n  step {step}: {error}" for step, error in errors.items())
    return CheckpointDeleteError(f"some steps in {url} could not be deleted:{causes}", step=min(errors))
