"""Pruning: delete the steps that a policy does not keep. Rank 0 only; usually in the save thread, after a commit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardckpt.errors import (
    CheckpointDamagedError,
    CheckpointDeleteError,
    CheckpointError,
    CheckpointLoadError,
    CheckpointNotFoundError,
)
from shardckpt.format.manifest import Manifest
from shardckpt.run.catalog import Catalog, Entry, read_record
from shardckpt.run.deletion import delete_step
from shardckpt.run.requests import each
from shardckpt.run.retention import NOTHING, Decision, Policy, StepFacts, decide
from shardckpt.run.scores import Scores, read_scores

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Deleted:
    """A step that is gone."""

    step: int
    reason: str
    nbytes: int
    """Of its files, as its record said."""


def prune(catalog: Catalog, policy: Policy, *, protected: Mapping[int, str] = NOTHING) -> list[Deleted]:
    """Delete what the policy does not keep, oldest first, as `plan_prune` says.

    Put into `protected`, with a reason each: the step resumed from, and the step just saved, which is not the one with
    the highest number after going back to an earlier step. A doomed step whose record is damaged is left alone and
    logged: nothing proves any more that it is ours.

    If deletions fail the others are still tried, and one `CheckpointDeleteError` names each failed step and its cause
    (its own `step` is the first of them). `CheckpointLoadError` if it cannot be told what is there; then nothing was
    deleted.
    """
    entries = catalog.entries()
    decision = _decide(catalog, policy, entries, protected)
    doomed = [entry for entry in entries if entry.step in decision.doomed]
    deleted: list[Deleted] = []
    errors: dict[int, CheckpointError] = {}
    for entry in doomed:
        try:
            nbytes = _delete(catalog, entry)
        except CheckpointDamagedError as error:
            _log.warning("step %d is not deleted although no rule keeps it: %s", entry.step, error)
        except CheckpointNotFoundError:
            _log.info("step %d is gone already", entry.step)
        except (CheckpointDeleteError, CheckpointLoadError) as error:
            errors[entry.step] = error
        else:
            deleted.append(Deleted(entry.step, f"not kept by {policy}", nbytes))
            _log.info("deleted step %d, %d bytes: not kept by %s", entry.step, nbytes, policy)
    if errors:
        raise _joined(errors, catalog.storage.url) from next(iter(errors.values()))
    return deleted


def plan_prune(catalog: Catalog, policy: Policy, *, protected: Mapping[int, str] = NOTHING) -> Decision:
    """What `prune` would keep, and why, and what it would delete. Only looks.

    Besides what `decide` keeps, these stay: the newest step whose record is sound, and, if the policy looks at scores,
    steps whose score is damaged, for they may be the best.
    """
    return _decide(catalog, policy, catalog.entries(), protected)


def _decide(catalog: Catalog, policy: Policy, entries: Sequence[Entry], protected: Mapping[int, str]) -> Decision:
    scores = read_scores(catalog.storage, entries) if "score" in policy.uses else Scores()
    created = _times(catalog, entries) if "created" in policy.uses else {}
    history = [StepFacts(e.step, created.get(e.step), scores.by_step.get(e.step)) for e in entries]
    stay = dict.fromkeys(scores.damaged, "its score cannot be read") | dict(protected)
    decision = decide(policy, history, protected=stay)
    if not decision.doomed:
        return decision
    sound = _newest_sound(catalog, entries)
    if sound in decision.doomed:
        return decide(policy, history, protected=stay | {sound: "the newest one with a sound record"})
    return decision


def _newest_sound(catalog: Catalog, entries: Sequence[Entry]) -> int:
    """The newest step whose record can be read and is whole; -1 if there is none."""
    for entry in reversed(entries):
        if _sound_record(catalog, entry) is not None:
            return entry.step
    return -1


def _times(catalog: Catalog, entries: Sequence[Entry]) -> dict[int, str]:
    records = each(lambda entry: _sound_record(catalog, entry), entries)
    return {record.step: record.created for record in records if record is not None}


def _sound_record(catalog: Catalog, entry: Entry) -> Manifest | None:
    try:
        return read_record(catalog.storage, entry)
    except (CheckpointDamagedError, CheckpointNotFoundError):
        return None


def _delete(catalog: Catalog, entry: Entry) -> int:
    manifest = read_record(catalog.storage, entry)
    delete_step(catalog.storage, entry, manifest=manifest)
    return manifest.nbytes


def _joined(errors: Mapping[int, CheckpointError], url: str) -> CheckpointDeleteError:
    causes = "".join(f"\n  step {step}: {error}" for step, error in errors.items())
    return CheckpointDeleteError(f"some steps in {url} could not be deleted:{causes}", step=min(errors))
