"""What the ranks of a DCP save tell each other, inside DCP's own plans and results, and the record that comes of it.

prepare_local_plan      Request      every rank to the coordinator     what I hold
prepare_global_plan     Assignment   the coordinator to every rank     who you are, where you write
write_data              Written      every rank to the coordinator     what I have durably written
                        Failure      ... or why not
finish                  compose      on the coordinator
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from shardckpt.engine.committing.receipts import compose_manifest, merge_tables
from shardckpt.engine.saving.write import Receipt
from shardckpt.errors import CheckpointSaveError
from shardckpt.format.manifest import LayoutEntry, Manifest, MeshEntry, Table, TensorEntry
from shardckpt.format.placement import Piece


@dataclass(frozen=True, slots=True)
class Keys:
    """The flat names of a rank's state, before DCP leaves some of them to other ranks."""

    tensors: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.tensors, self.values]).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Request:
    """In a local plan: the digest of this rank's keys, and a number used once, to tell this save from all others."""

    once: str
    keys: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """In a final plan: this rank's number, the attempt's folder, and whether it is to tell its keys."""

    once: str
    rank: int
    world_size: int
    prefix: str
    tell_keys: bool


@dataclass(frozen=True, slots=True)
class WrittenBox:
    """A part of a tensor that a rank has written: the tensor's dtype and whole shape, and where the part lies in it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """From one rank: its receipt; the parts of tensors in its file; and digests of the tensors that are not sharded.

    Of the latter one rank writes each, but all that hold it give a digest, so that a difference is found.
    """

    receipt: Receipt
    boxes: tuple[WrittenBox, ...]
    unsharded: Mapping[str, str] = field(default_factory=dict)
    keys: Keys | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One save, as its coordinator knows it."""

    attempt: str
    prefix: str
    folder: str
    step: int
    groups: Mapping[str, tuple[int, ...]]
    """By digest of keys, the ranks that hold these keys; the first of them tells them."""
    known: bytes | None = None
    """See `begin_attempt`."""


def compose(attempt: Attempt, written: Sequence[Written], *, created: str) -> Manifest:
    """The record. `CheckpointSaveError` if two ranks describe a tensor differently."""
    layouts: dict[LayoutEntry, int] = {}
    tensors = {name: _entry(name, parts, layouts) for name, parts in _by_name(written).items()}
    listed = {name for report in written if report.keys is not None for name in report.keys.tensors}
    added = [name for name in tensors if name not in listed]  # a planner may bring in names in its global plan
    tables: list[tuple[list[MeshEntry], list[LayoutEntry], Table]] = []
    for digest, ranks in attempt.groups.items():
        keys = written[ranks[0]].keys
        if keys is None or keys.digest != digest:
            raise CheckpointSaveError(f"rank {ranks[0]} did not tell which keys it holds")
        present = [name for name in (*keys.tensors, *added) if name in tensors]
        table = Table(ranks, {name: tensors[name] for name in present}, dict.fromkeys(keys.values, "rank"))
        tables.append(([], list(layouts), table))
    receipts, merged = [w.receipt for w in written], merge_tables(tables)
    return compose_manifest(attempt.step, attempt.attempt, created, receipts, merged, {})


def difference(written: Sequence[Written]) -> str:
    """Which tensors that are not sharded differ between which ranks, and what to do; "" if there are none."""
    seen: dict[str, dict[str, int]] = {}
    for rank, report in enumerate(written):
        for name, digest in report.unsharded.items():
            seen.setdefault(name, {}).setdefault(digest, rank)
    differing = {name: sorted(ranks.values()) for name, ranks in seen.items() if len(ranks) > 1}
    if not differing:
        return ""
    lines = [f"{name} (for example ranks {ranks[0]} and {ranks[1]})" for name, ranks in sorted(differing.items())]
    more = f"; and {len(lines) - 10} more" if len(lines) > 10 else ""
    return (
        f"ranks hold different tensors under the same key, of which DCP stores one: {'; '.join(lines[:10])}{more}. "
        "Bring the ranks into step, make them DTensors, give each rank a key of its own, or say that any of them will "
        "do: DcpWriter(..., unsharded='any')"
    )


def _by_name(written: Sequence[Written]) -> dict[str, list[tuple[int, WrittenBox]]]:
    found: dict[str, list[tuple[int, WrittenBox]]] = {}
    for rank, report in enumerate(written):
        for box in report.boxes:
            found.setdefault(box.name, []).append((rank, box))
    return found


def _entry(name: str, parts: Collection[tuple[int, WrittenBox]], layouts: dict[LayoutEntry, int]) -> TensorEntry:
    kinds = {(box.dtype, box.shape) for _, box in parts}
    if len(kinds) > 1:
        raise CheckpointSaveError(f"{name}: ranks wrote parts of different tensors: {sorted(kinds)}")
    dtype, shape = kinds.pop()
    pieces = [Piece(rank, box.offsets, box.lengths) for rank, box in parts] if all(shape) else []
    layout = LayoutEntry("rank", pieces=tuple(sorted(pieces, key=lambda piece: piece.offsets)))
    return TensorEntry(dtype, shape, layouts.setdefault(layout, len(layouts)))
