"""What is known of a run: its steps by their records, its saves by their log. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from shardckpt.errors import CheckpointDamagedError, CheckpointNotFoundError
from shardckpt.format.index import ITEMSIZE
from shardckpt.format.layout import CARBON_COPY, CONSOLIDATED, METADATA
from shardckpt.format.manifest import Manifest
from shardckpt.run.catalog import Catalog
from shardckpt.run.retention import Policy
from shardckpt.storage.local import LocalStorage
from shardckpt.tools.listing import StepLine, list_checkpoints
from shardckpt.tools.page.saves import SaveLine, read_saves
from shardckpt.tools.place import Where, opened

LOG = "saves.jsonl"
"""The log that is looked for in the root of a run on a file system, if none is named."""
OTHER = "values, indexes, padding"
_KINDS = {CONSOLIDATED: "whole model once more", METADATA: "metadata", CARBON_COPY: "copies of files"}


@dataclass(frozen=True, slots=True)
class RunFacts:
    """All that a page is made from. Pure data."""

    url: str
    """Without credentials."""
    made: str
    """When it was looked at; UTC, ISO 8601."""
    steps: tuple[StepLine, ...]
    parts: Mapping[str, int]
    """Of the newest step: bytes by part."""
    parts_step: int | None
    saves: tuple[SaveLine, ...]
    log: str | None
    """Where the log was found; None if there is none."""
    policy: str = ""
    """What `kept` of the steps is by; empty if nothing was asked."""


def gather(
    where: Where,
    *,
    log: str | os.PathLike[str] | None = None,
    keep: Policy | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> RunFacts:
    """Look at a run and its log. Errors as those of `list_checkpoints`, and `OSError` if a log that is named is not
    there. `keep`: a policy, to say which steps it would keep and why."""
    listing = list_checkpoints(where, keep=keep, storage_options=storage_options)
    with opened(where, storage_options) as place:
        storage = place.storage
        own = os.path.join(storage.url, LOG) if isinstance(storage, LocalStorage) else ""
        path = os.fspath(log) if log is not None else own if os.path.isfile(own) else None
        parts, step = _newest(Catalog(storage), listing.steps)
    saves = tuple(read_saves(path)) if path is not None else ()
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    policy = str(keep) if keep is not None else ""
    return RunFacts(listing.url, made, listing.steps, parts, step, saves, path, policy)


def _newest(catalog: Catalog, steps: Sequence[StepLine]) -> tuple[dict[str, int], int | None]:
    for line in reversed(steps):
        if line.state == "committed" and line.step is not None:
            try:
                return space_by_part(catalog.record(line.step)[1]), line.step
            except (CheckpointDamagedError, CheckpointNotFoundError):
                continue
    return {}, None


def space_by_part(manifest: Manifest) -> dict[str, int]:
    """Bytes of all files of a step, by what they are for: tensors by the top-level key of the state that they are in,
    files of their own kind, and what is left. The largest first."""
    found: dict[str, int] = {}
    seen: dict[str, int] = {}
    for table in manifest.tables:
        for name, entry in table.tensors.items():
            nbytes = math.prod(entry.shape) * ITEMSIZE[entry.dtype]
            several = name in manifest.differ and manifest.layouts[entry.layout].home == "rank"
            seen[name] = nbytes * len(table.ranks) + seen.get(name, 0) if several else nbytes
    for name, nbytes in seen.items():
        part = name.partition(".")[0]
        found[part] = found.get(part, 0) + nbytes
    for file in manifest.files:
        if file.kind in _KINDS:
            found[_KINDS[file.kind]] = found.get(_KINDS[file.kind], 0) + file.nbytes
    rest = manifest.nbytes - sum(found.values())
    if rest > 0:
        found[OTHER] = rest
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def without_phases(facts: RunFacts) -> RunFacts:
    """The same without what each rank did, which is most of it: for JSON."""
    return replace(facts, saves=tuple(replace(save, ranks=()) for save in facts.saves))
