"""From receipts to record: what each rank says it wrote and holds, checked against the others, becomes the manifest."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch

from shardckpt.engine.committing.bundles import differing
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.saving.plan import SavePlan
from shardckpt.engine.saving.write import Receipt, Sealed, SealedFile
from shardckpt.format.index import as_pieces
from shardckpt.format.manifest import (
    OF_RANK,
    FileEntry,
    LayoutEntry,
    Manifest,
    MeshEntry,
    Table,
    decode_table,
    encode_table,
    spelled,
)
from shardckpt.gang.announce import announce
from shardckpt.gang.base import Gang
from shardckpt.gang.together import together_gather

Tables = Iterable[tuple[list[MeshEntry], list[LayoutEntry], Table]]
"""Each kind of table, with the meshes and layouts that its numbers refer to; its `ranks` hold it."""


@dataclass(frozen=True, slots=True)
class Merged:
    """All tables of a record, with the meshes and layouts that all their numbers refer to."""

    meshes: tuple[MeshEntry, ...]
    layouts: tuple[LayoutEntry, ...]
    tables: tuple[Table, ...]


def describe_own(
    at: Coordinates,
    plan: SavePlan,
    sealed: Sequence[Sealed],
    files: tuple[FileEntry, ...],
    alike: Mapping[str, Mapping[str, str]],
    seconds: Mapping[str, float],
) -> Receipt:
    """This rank's receipt, made on its save thread after its files are durable."""
    whole = [file for file in sealed if isinstance(file, SealedFile)]
    digests = {
        file.name: _plain_tensors(plan, file) | _value_digests(plan, file.entry.kind)
        for file in whole
        if _has_siblings(file.entry.kind, at)
    }
    own_alike = {file: _digest_of(keys) for file, keys in alike.items()}
    wrote = {file.name: (0, file.nbytes) for file in files} | {file.name: (file.start, file.end) for file in sealed}
    return Receipt(at.rank, at.shard, files, digests, own_alike, _table_digest(plan), seconds, wrote)


def _plain_tensors(plan: SavePlan, file: SealedFile) -> dict[str, str]:
    layouts = plan.layouts
    plain = {
        name
        for name, entry in plan.table.tensors.items()
        if layouts[entry.layout].mesh is None and not layouts[entry.layout].pieces
    }
    return {name: text for name, text in file.digests().items() if name in plain}


def disagreements(receipts: Sequence[Receipt]) -> list[str]:
    """The files of which two ranks hold different content although it was taken to be the same."""
    holding: dict[str, list[Receipt]] = {}
    for receipt in receipts:
        for group in receipt.alike:
            holding.setdefault(group, []).append(receipt)
    in_shard = Counter(receipt.shard for receipt in receipts)
    found = []
    for group, those in holding.items():
        shard = None if " " in group else those[0].shard
        digests = [receipt.alike[group] for receipt in those if shard in (None, receipt.shard)]
        if len(set(digests)) > 1 or (shard is not None and len(digests) < in_shard[shard]):
            found.append(group)
    return sorted(found)


def _expected(group: str, receipts: Sequence[Receipt]) -> list[Receipt]:
    """Of those that must hold a group alike: for a file that ranks share, all of the shard; else those that do."""
    those = [receipt for receipt in receipts if group in receipt.alike]
    if " " in group:  # tensors in another rank's file (see `plan`)
        return those
    return [receipt for receipt in receipts if receipt.shard == those[0].shard]


def compose_manifest(
    step: int,
    attempt: str,
    created: str,
    receipts: Sequence[Receipt],
    tables: Merged,
    metadata: dict[str, Any],
    *,
    differ: Sequence[str] | None = None,
) -> Manifest:
    """The record of all receipts. On rank 0. `ValueError` if some bytes of a file were written twice or by nobody.

    `differ`: the keys that differ between ranks, if the receipts do not say it themselves.
    """
    files = sorted((file for receipt in receipts for file in receipt.files), key=lambda file: file.name)
    _check_written(files, receipts)
    return Manifest(
        step=step,
        attempt=attempt,
        created=created,
        shard_of=tuple(receipt.shard for receipt in receipts),
        files=tuple(files),
        meshes=tables.meshes,
        layouts=tables.layouts,
        tables=tables.tables,
        differ=differing(receipts) if differ is None else tuple(differ),
        mesh_sizes=_sizes(receipts),
        versions={"shardckpt": _version(), "torch": torch.__version__, "python": platform.python_version()},
        metadata=metadata,
    )


def _check_written(files: Sequence[FileEntry], receipts: Sequence[Receipt]) -> None:
    """The ranges that the ranks say they wrote must make up exactly the files that are recorded."""
    names = [file.name for file in files]
    if len(set(names)) != len(names):
        raise ValueError(f"two ranks wrote the same file: {sorted({n for n in names if names.count(n) > 1})}")
    wrote: dict[str, list[tuple[int, int]]] = {}
    for receipt in receipts:
        for name, (start, end) in receipt.wrote.items():
            wrote.setdefault(name, []).append((start, end))
    for file in files:
        position = 0
        for start, end in sorted(wrote.pop(file.name, ())):
            if start != position:
                raise ValueError(
                    f"of {file.name} the bytes from {min(start, position)} to {max(start, position)} "
                    "were written twice or by nobody: the ranks do not have the same plan"
                )
            position = end
        if position != file.nbytes:
            raise ValueError(f"of {file.name} {position} bytes were written, but it should have {file.nbytes}")
    if wrote:
        raise ValueError(f"ranks wrote parts of {sorted(wrote)}, of which nobody wrote the end")


class TableBook:
    """What rank 0 already knows of the ranks' tables, so that each kind travels once per run and not once per save."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._ranks_of: dict[str, list[int]] = {}
        self._merged = Merged((), (), ())

    def ask(
        self, gang: Gang, plan: SavePlan, receipts: Sequence[Receipt] | None, *, timeout: timedelta, step: int
    ) -> Sequence[Any]:
        """Rank 0 asks one rank of each kind that it does not know; gives there what they sent, for `learn`."""
        kinds = _ranks_by_table(receipts or ())
        unknown = [ranks[0] for digest, ranks in kinds.items() if digest not in self._known]
        asked = announce(gang, lambda: unknown, phase="tables", timeout=timeout, step=step)
        if not asked:
            return ()

        def own() -> Any:
            return _encode_tables(plan) if gang.rank in asked else None

        sent = together_gather(gang, own, phase="tables", timeout=timeout, step=step) or ()
        return [content for content in sent if content is not None]

    def learn(self, receipts: Sequence[Receipt], sent: Sequence[Any]) -> Merged:
        """On rank 0: the tables of all ranks, of which those that it did not know were `sent`."""
        self._known |= {_digest_of(content): content for content in sent}
        kinds = _ranks_by_table(receipts)
        if kinds != self._ranks_of:
            self._known = {digest: self._known[digest] for digest in kinds}
            self._merged = merge_tables(_decode_tables(self._known[digest], ranks) for digest, ranks in kinds.items())
            self._ranks_of = kinds
        return self._merged


def _ranks_by_table(receipts: Iterable[Receipt]) -> dict[str, list[int]]:
    """Digest of a table to the ranks that hold it."""
    kinds: dict[str, list[int]] = {}
    for receipt in receipts:
        kinds.setdefault(receipt.table, []).append(receipt.rank)
    return kinds


def held_of(files: Any, alike: Mapping[str, Mapping[str, str]]) -> Any:
    """What this rank holds of the files in doubt, key by key."""
    return {file: dict(alike[file]) for file in files if file in alike}


def explain(held: Sequence[Any], receipts: Sequence[Receipt]) -> str:
    """Which keys differ between which ranks, and what to do. `held`: by rank, what `held_of` gave."""
    seen: dict[tuple[str, str], dict[str, list[int]]] = {}
    for rank, groups in enumerate(held):
        for group, keys in groups.items():
            for key, digest in keys.items():
                seen.setdefault((group, key), {}).setdefault(digest, []).append(rank)
    expected = {group: [each.rank for each in _expected(group, receipts)] for group in {group for group, _ in seen}}
    different: dict[str, str] = {}
    for (group, key), ranks_by_digest in sorted(seen.items()):
        having = {rank for ranks in ranks_by_digest.values() for rank in ranks}
        lacking = [rank for rank in expected[group] if rank not in having]
        if lacking:
            different.setdefault(key, f"{key} (rank {min(having)} has it, rank {lacking[0]} does not)")
        elif len(ranks_by_digest) > 1:
            one, other, *_ = sorted(ranks[0] for ranks in ranks_by_digest.values())
            different.setdefault(key, f"{key} (for example ranks {one} and {other})")
    lines = [line for _, line in sorted(different.items())]
    what = "; ".join(lines[:10]) + (f"; and {len(lines) - 10} more" if len(lines) > 10 else "")
    return (
        "ranks hold different values of what is stored once for them, because it was declared replicated, or belongs "
        f"to a model or an optimizer and is not sharded between them: {what}. Only one of them would have been kept. "
        "Bring the ranks into step, make them DTensors over a mesh of all these ranks, or save them as plain entries "
        "of the state, which are kept per rank"
    )


def _has_siblings(kind: str, at: Coordinates) -> bool:
    return at.world_size > 1 if kind in OF_RANK else at.shards > 1


def _value_digests(plan: SavePlan, kind: str) -> dict[str, str]:
    """Values by their text: equal values have equal texts, whatever objects they share."""
    return {key: plan.values[key] for key, home in plan.table.values.items() if home == kind}


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


def _encode_tables(plan: SavePlan) -> dict[str, Any]:
    return {
        "meshes": [[list(m.dims), list(m.shape), list(m.ranks)] for m in plan.meshes],
        "layouts": [[entry.home, entry.mesh, list(entry.placements)] for entry in plan.layouts],
        "given": [list(entry.given) for entry in plan.layouts],
        "pieces": [[[p.rank, list(p.offsets), list(p.lengths)] for p in entry.pieces] for entry in plan.layouts],
        "table": {**encode_table(replace(plan.table, ranks=())), "ranks": []},
    }


def _table_digest(plan: SavePlan) -> str:
    if "digest" not in plan.notes:
        plan.notes["digest"] = _digest_of(_encode_tables(plan))
    return str(plan.notes["digest"])


def _decode_tables(content: Any, ranks: list[int]) -> tuple[list[MeshEntry], list[LayoutEntry], Table]:
    meshes = [MeshEntry(tuple(dims), tuple(shape), tuple(members)) for dims, shape, members in content["meshes"]]
    rows = zip(content["layouts"], content["given"], content["pieces"], strict=True)
    layouts = [
        LayoutEntry(home, mesh, tuple(placements), as_pieces(pieces), tuple(given))
        for (home, mesh, placements), given, pieces in rows
    ]
    return meshes, layouts, replace(decode_table(content["table"]), ranks=tuple(ranks))


def merge_tables(tables: Tables) -> Merged:
    """One numbering of meshes and layouts for all tables."""
    meshes: dict[MeshEntry, int] = {}
    layouts: dict[LayoutEntry, int] = {}
    merged: list[Table] = []
    for own_meshes, own_layouts, table in tables:
        numbers = []
        for layout in own_layouts:
            mesh = None if layout.mesh is None else meshes.setdefault(own_meshes[layout.mesh], len(meshes))
            numbers.append(layouts.setdefault(replace(layout, mesh=mesh), len(layouts)))
        tensors = {name: replace(entry, layout=numbers[entry.layout]) for name, entry in table.tensors.items()}
        merged.append(spelled(replace(table, tensors=tensors)))
    return Merged(tuple(meshes), tuple(layouts), tuple(merged))


def _sizes(receipts: Sequence[Receipt]) -> dict[str, int]:
    shards = max(receipt.shard for receipt in receipts) + 1
    return {"data": len(receipts) // shards, "model": shards}


def _version() -> str:
    try:
        from shardckpt import __version__
    except ImportError:  # run from a source tree that was never installed
        return "unknown"
    return str(__version__)
