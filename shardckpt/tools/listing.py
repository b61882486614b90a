"""List: the steps of a run, or the runs below a folder, without opening a file of theirs. No torch; any thread.

Costs one request for the root and three for each step: is its record there, the record, the score. Many at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from shardckpt.errors import CheckpointDamagedError, CheckpointNotFoundError
from shardckpt.format.layout import parse_aside, parse_step
from shardckpt.format.manifest import Manifest
from shardckpt.run.catalog import Catalog, Entry
from shardckpt.run.keeping.metrics import read_metrics
from shardckpt.run.prune import plan_retention
from shardckpt.run.requests import each
from shardckpt.run.retention import Policy
from shardckpt.run.scores import Scores, read_scores
from shardckpt.storage.base import Storage
from shardckpt.tools.contents import Found, leftovers
from shardckpt.tools.place import Where, opened


@dataclass(frozen=True, slots=True)
class StepLine:
    """One step, or what looks like one."""

    step: int | None
    folder: str
    state: str
    """"committed", "model only", "damaged record", or a `Standing` of what is not in force."""
    created: str | None = None
    """UTC, ISO 8601."""
    nbytes: int | None = None
    """Of all its files, as its record says."""
    world_size: int | None = None
    parts: tuple[str, ...] = ()
    """The top-level keys of its state."""
    score: float | None = None
    kept: str | None = None
    """Why the policy that was given keeps it; None if it does not, or none was given."""
    shared_nbytes: int = 0
    """Of its bytes, those in blobs, which other steps may refer to as well."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """By name, if they were asked for."""


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run below a folder of runs, by the names of its folders alone."""

    name: str
    steps: int
    """Folders that are called like steps; whether they are committed was not looked at."""
    latest: int


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies at a place: steps, or else runs; perhaps nothing."""

    url: str
    """Without credentials."""
    steps: tuple[StepLine, ...] = ()
    runs: tuple[RunLine, ...] = ()


def list_checkpoints(
    where: Where,
    *,
    keep: Policy | None = None,
    last: int | None = None,
    metrics: bool = False,
    storage_options: Mapping[str, object] | None = None,
) -> Listing:
    """The steps of a run, ascending, with what is not in force; of a folder of runs, the runs.

    Errors as in `verify`, but an empty folder is an empty listing. `keep`: a policy, to say why each step would stay.
    `last`: only so many committed steps of the highest numbers, and what is not in force from the first of them on;
    the others are not looked at. `metrics`: also read those, by one request more for each step.
    """
    with opened(where, storage_options) as place:
        storage = place.storage
        entries = _entries(Catalog(storage), place.folder, last)
        since = entries[0].step if entries and last is not None else None
        others = leftovers(storage, entries, since=since, of=place.folder)
        lines = _committed(storage, entries, keep)
        if metrics:
            known = read_metrics(storage, entries)
            lines = [replace(line, metrics=known.get(line.step) or {}) for line in lines if line.step is not None]
        lines += map(_leftover, others)
        if place.folder:
            lines = [line for line in lines if line.folder.partition("/")[0] == place.folder]
        lines.sort(key=lambda line: (-1 if line.step is None else line.step, line.folder))
        return Listing(storage.url, tuple(lines), () if lines or place.folder else tuple(_runs(storage)))


def _entries(catalog: Catalog, folder: str, last: int | None) -> list[Entry]:
    if folder:
        step = parse_step(folder)
        return [catalog.entry(step)] if step is not None and catalog.has(step) else []
    if last is None:
        return catalog.entries()
    return [*islice(catalog.newest_first(), last)][::-1]


def _committed(storage: Storage, entries: Sequence[Entry], keep: Policy | None) -> list[StepLine]:
    records = each(lambda entry: _record(storage, entry), entries)
    scores = read_scores(storage, entries)
    kept = plan_retention(Catalog(storage), keep).kept if keep is not None else {}
    return [
        _line(entry, record, scores, kept.get(entry.step))
        for entry, record in zip(entries, records, strict=True)
        if record is not None
    ]


def _record(storage: Storage, entry: Entry) -> Manifest | str | None:
    """A word for a damaged one; None if it has gone since it was listed."""
    try:
        return Catalog(storage).record(entry)[1]
    except CheckpointNotFoundError:
        return None
    except CheckpointDamagedError:
        return "damaged record"


def _line(entry: Entry, record: Manifest | str, scores: Scores, kept: str | None) -> StepLine:
    score = scores.by_step.get(entry.step)
    if isinstance(record, str):
        return StepLine(entry.step, entry.folder, record, score=score, kept=kept)
    state = "model only" if record.model_only else "committed"
    facts = (record.created, record.nbytes, record.world_size, record.parts)
    return StepLine(entry.step, entry.folder, state, *facts, score, kept, record.shared_nbytes)


def _leftover(found: Found) -> StepLine:
    return StepLine(found.step, found.folder, found.standing)


def _runs(storage: Storage) -> list[RunLine]:
    folders = [name[:-1] for name in storage.list() if name.endswith("/")]
    lines = []
    for folder, names in zip(folders, each(storage.list, folders), strict=True):
        steps = {_step_of(name) for name in names if name.endswith("/")} - {None}
        if steps:
            lines.append(RunLine(folder, len(steps), max(step for step in steps if step is not None)))
    return lines


def _step_of(name: str) -> int | None:
    aside = parse_aside(name)
    return aside.step if aside is not None else parse_step(name)
