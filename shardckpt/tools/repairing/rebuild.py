"""A record made anew from the files of a step: what each holds, and how the parts of sharded tensors fit together.

Each index says which boxes of which tensors lie in its file, and of what global shape they are. That a shard is missing
shows: the boxes do not make up the tensor. What no file says is how many ranks there were, so a person must; and every
one of them must have its file, or none. Of tensors that were sharded the record then has the pieces, as for states that
come from a DCP planner: they load on any mesh, bit for bit. What cannot come back is listed in the record itself.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch

from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.index import StoredBox
from shardckpt.format.layout import CONSOLIDATED, rank_file
from shardckpt.format.manifest import HOMES, Home, LayoutEntry, Manifest, Table, TensorEntry
from shardckpt.format.placement import Piece, is_tiling
from shardckpt.tools.repairing.content import Content
from shardckpt.tools.repairing.evidence import Evidence, entries_of, kind_of
from shardckpt.tools.report import REBUILT

LOST = ("metadata of the user", "time of the save", "mesh and placements of sharded tensors", "versions")
"""What stands in a record and in no file."""


@dataclass(slots=True)
class _Draft:
    """The tables as they come about."""

    layouts: dict[LayoutEntry, int] = field(default_factory=dict)
    tensors: dict[int, dict[str, TensorEntry]] = field(default_factory=dict)
    values: dict[int, dict[str, Home]] = field(default_factory=dict)
    differ: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def layout(self, layout: LayoutEntry) -> int:
        return self.layouts.setdefault(layout, len(self.layouts))


def rebuild(evidence: Evidence, *, step: int, ranks: int, attempt: str) -> Manifest:
    """The record of these files, saved by so many ranks. `CheckpointDamagedError` says all that does not fit."""
    files, shared = _by_rank(evidence), _by_kind(evidence)
    draft = _Draft(tensors={r: {} for r in range(ranks)}, values={r: {} for r in range(ranks)})
    lacking = sorted(set(range(ranks)) - files.keys()) if files else []
    draft.problems += [f"{rank_file(rank)} is missing" for rank in lacking]
    draft.problems += [f"{rank_file(rank)} is of none of {ranks} ranks" for rank in files if rank >= ranks]
    draft.problems += [
        f"{name} is of one of several model shards, and no file says which rank had which"
        for name in evidence.owns
        if kind_of(name) != "rank" and name.count(".") > 1
    ]
    consolidated = _is_consolidated(shared.get("model"), files.values())
    if not draft.problems:
        for kind, file in shared.items():
            if kind != "model" or not consolidated:
                _add_shared(draft, kind, file)
        _add_sharded(draft, files)
        _add_values(draft, files)
    if draft.problems:
        raise CheckpointDamagedError(
            f"no record can be made for {evidence.folder}: {'; '.join(draft.problems[:10])}"
            f"{f'; and {len(draft.problems) - 10} more' if len(draft.problems) > 10 else ''}",
            step=step,
        )
    known = [file.model_key for file in (*shared.values(), *files.values()) if file.model_key]
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return Manifest(
        step=step,
        attempt=attempt,
        created=now,
        shard_of=(0,) * ranks,
        files=entries_of(evidence, {"model.pt": CONSOLIDATED} if consolidated else {}),
        layouts=tuple(draft.layouts),
        tables=_tables(draft),
        differ=tuple(sorted(draft.differ)),
        mesh_sizes={"data": ranks, "model": 1},
        versions={"torch": torch.__version__, "python": platform.python_version()},
        metadata={REBUILT: {"from": "the files of the step", "at": now, "lost": list(LOST)}},
        model_key=known[0] if known else "model",
    )


def _by_rank(evidence: Evidence) -> dict[int, Content]:
    """Of rank_<r>.pt."""
    numbers = {int(name[5:-3]): name for name in evidence.owns if kind_of(name) == "rank"}
    return {rank: evidence.contents[name] for rank, name in sorted(numbers.items())}


def _by_kind(evidence: Evidence) -> dict[str, Content]:
    """Of model.pt and replicated.pt."""
    return {kind_of(name): content for name, content in evidence.contents.items() if kind_of(name) in HOMES[:2]}


def _is_consolidated(model: Content | None, others: Iterable[Content]) -> bool:
    """Whether a model.pt holds once more what the files of the ranks have: then it is no home of anything."""
    return model is not None and any(not model.tensors.keys().isdisjoint(file.tensors) for file in others)


def _add_shared(draft: _Draft, kind: str, file: Content) -> None:
    """Of a file that all ranks hold alike."""
    home: Home = "model" if kind == "model" else "replicated"
    number = draft.layout(LayoutEntry(home)) if file.tensors else 0
    for name, (dtype, shape) in file.tensors.items():
        if math.prod(shape) and not _is_whole(file.boxes.get(name, [])):
            draft.problems.append(f"{name} is not whole in {home}.pt")
            continue
        entry = TensorEntry(dtype, shape, number)
        for tensors in draft.tensors.values():
            tensors[name] = entry
    for values in draft.values.values():
        values.update(dict.fromkeys(file.values, home))


def _add_sharded(draft: _Draft, files: Mapping[int, Content]) -> None:
    """Of the files of the ranks: each tensor is whole on all that have it, or in pieces that make it up."""
    for name in dict.fromkeys(name for file in files.values() for name in file.tensors):
        holders = {rank: file for rank, file in files.items() if name in file.tensors}
        boxes = {rank: file.boxes.get(name, []) for rank, file in holders.items()}
        if not any(boxes.values()) or all(map(_is_whole, boxes.values())):
            _add_whole(draft, name, holders)
        else:
            _add_pieces(draft, name, holders, boxes)


def _is_whole(boxes: list[StoredBox]) -> bool:
    """Whether a file has all of a tensor, in one box."""
    return len(boxes) == 1 and boxes[0].box.lengths == boxes[0].shape


def _add_whole(draft: _Draft, name: str, holders: Mapping[int, Content]) -> None:
    number, seen = draft.layout(LayoutEntry("rank")), set()
    for rank, file in holders.items():
        dtype, shape = file.tensors[name]
        draft.tensors[rank][name] = TensorEntry(dtype, shape, number)
        boxes = file.boxes.get(name, [])
        seen.add((dtype, shape, file.index.records[boxes[0].record].crc if boxes else 0))
    if len(seen) > 1:
        draft.differ.add(name)


def _add_pieces(draft: _Draft, name: str, holders: Mapping[int, Content], boxes: Mapping[int, list[StoredBox]]) -> None:
    kinds = {(holders[rank].tensors[name][0], box.shape) for rank, own in boxes.items() for box in own}
    pieces = {(b.box.offsets, b.box.lengths): rank for rank, own in sorted(boxes.items(), reverse=True) for b in own}
    ordered = tuple(Piece(rank, *corner) for corner, rank in sorted(pieces.items()))
    if len(kinds) != 1:
        draft.problems.append(f"{name}: the files of ranks {sorted(boxes)} do not agree on its dtype and shape")
        return
    ((dtype, shape),) = kinds
    if not is_tiling(shape, ordered):
        draft.problems.append(f"{name}: what is there does not make up a tensor of shape {list(shape)}")
        return
    entry = TensorEntry(dtype, shape, draft.layout(LayoutEntry("rank", pieces=ordered)))
    for tensors in draft.tensors.values():  # with one model shard, also those that have no piece hold it
        tensors[name] = entry


def _add_values(draft: _Draft, files: Mapping[int, Content]) -> None:
    elsewhere = {name for tensors in draft.tensors.values() for name in tensors}
    elsewhere |= {name for values in draft.values.values() for name in values}
    elsewhere |= {name for file in files.values() for name in file.values}
    seen: dict[str, set[str]] = {}
    for rank, file in files.items():
        own = file.values | {name: text for name, text in file.gaps.items() if not _is_filled(name, elsewhere)}
        for name, text in own.items():
            draft.values[rank].setdefault(name, "rank")
            seen.setdefault(name, set()).add(text)
    draft.differ |= {name for name, texts in seen.items() if len(texts) > 1}


def _is_filled(name: str, elsewhere: set[str]) -> bool:
    """Whether another file has what belongs at this place of a list."""
    return any(other == name or other.startswith(f"{name}.") for other in elsewhere)


def _tables(draft: _Draft) -> tuple[Table, ...]:
    ranks: dict[tuple[Any, ...], list[int]] = {}
    for rank, tensors in draft.tensors.items():
        if tensors or draft.values[rank]:
            ranks.setdefault((tuple(tensors.items()), tuple(draft.values[rank].items())), []).append(rank)
    return tuple(Table(tuple(own), dict(tensors), dict(values)) for (tensors, values), own in ranks.items())
