"""What a save costs on one rank of many, and on rank 0: real plans, real receipts, the real record."""

from __future__ import annotations

import gc
import json
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from benchmarks.scale.jobs import Mesh, Model, Rank
from shardckpt.engine.committing.receipts import compose_manifest, describe_own, disagreements, merge_tables
from shardckpt.engine.garbage import uncollected
from shardckpt.engine.saving.again import Planner
from shardckpt.engine.saving.plan import SavePlan
from shardckpt.engine.saving.staging.file import StagedFile, Wanted
from shardckpt.engine.saving.write import Receipt, Sealed, SealedFile, SealedRange, decode_receipt
from shardckpt.engine.splits.pieces import check_agreed
from shardckpt.format.manifest import FileEntry, Manifest, encode_manifest
from shardckpt.state import StateReader

LEAST_SHARE = 8 << 20
"""As on an object store: from how many bytes on ranks put a file together."""
_T = TypeVar("_T")


class SizedFile(StagedFile):
    """A file that is laid out, with its index, tree and directory, and never filled: all its sums are 0."""

    contents: Mapping[int, bytes] = {}
    """After `seal`, of a file of which this rank writes the end: its index and its tree, by where they lie."""

    def jobs(self, wanted: Wanted) -> Iterator[Callable[[], None]]:
        return iter(())

    def seal(self, rank: int, *, threads: int = 1) -> Sealed | None:
        """As `ImagedFile` does it."""
        assert self._file is not None
        crcs, share, file = [0] * len(self._file.records), self._share, self._file
        self._crcs = [*crcs]
        if share.is_empty:
            return None
        if not share.tail:
            return SealedRange(file.name, (), share.start, share.end, share.numbers)
        tail = self._tail(crcs)
        nbytes = self._layout.tail + len(tail.content)
        entry = FileEntry(file.name, nbytes, 0, file.home, rank, tail.index, tail.tree)
        self.contents = {at: tail.content[at - self._layout.tail :][:size] for at, size, _ in (tail.index, tail.tree)}
        return SealedFile(entry, (), self.digests, share.start, share.whole, share.numbers)


@dataclass(slots=True)
class Planned:
    """What one rank did before a byte is copied, and what it sends."""

    plan: SavePlan
    receipt: Receipt
    contents: dict[str, Mapping[int, bytes]]
    """By file: its index and its tree, by where they lie."""
    seconds: dict[str, float]
    """take_apart and plan, in the first save and in one of the same state; receipt."""
    objects: int
    """Python objects, of those that the collector looks at, that the first plan made and keeps."""

    @property
    def index_nbytes(self) -> int:
        """Of all files that this rank writes the end of."""
        return sum(file.index[1] for file in self.receipt.files if file.index)

    @property
    def tree_nbytes(self) -> int:
        """The same of their trees."""
        return sum(file.tree[1] for file in self.receipt.files if file.tree)


def plan_rank(mesh: Mesh, model: Model, rank: int, *, again: int = 5) -> Planned:
    """One rank's part of a save; `again`: how often the same state is planned again (the median counts)."""
    one = Rank(mesh, model, rank)
    state, at = one.state(), one.coordinates
    reader, planner, seconds = StateReader(), Planner(at), dict[str, float]()
    with uncollected():
        parts, seconds["take apart, first"] = timed(lambda: reader.take_apart(state))
        before = len(gc.get_objects())
        plan, seconds["plan, first"] = timed(lambda: planner.plan(parts))
        objects = len(gc.get_objects()) - before
        tries = []
        for _ in range(again):
            parts, apart = timed(lambda: reader.take_apart(state))
            plan, planned = timed(lambda parts=parts: planner.plan(parts))  # type: ignore[misc]
            tries.append((apart + planned, apart, planned))
        _, seconds["take apart, again"], seconds["plan, again"] = sorted(tries)[len(tries) // 2]
    files = [SizedFile() for _ in plan.files]
    sealed = []
    for own, file in zip(files, plan.files, strict=True):
        own.lay_out(file, least_share=LEAST_SHARE)
        sealed.append(own.seal(rank))
    written = [file for file in sealed if file is not None]
    entries = tuple(file.entry for file in written if isinstance(file, SealedFile))
    alike = {file.name: file.held(plan.values) for file in files if file.is_shared}
    receipt, seconds["receipt"] = timed(lambda: describe_own(at, plan, written, entries, alike, {"write": 1.0}))
    return Planned(plan, receipt, {file.name: file.contents for file in files}, seconds, objects)


@dataclass(slots=True)
class Committed:
    """What rank 0 did with all receipts."""

    mesh: Mesh
    model: Model
    manifest: Manifest
    record: bytes
    told_nbytes: int
    """Of the record, as it is told to all ranks: packed."""
    received_nbytes: int
    """Of all receipts, as JSON."""
    seconds: dict[str, float]
    planned: dict[int, Planned]
    """The ranks whose receipts are their own; those of the others are made from one of these."""


def commit(
    mesh: Mesh,
    model: Model,
    *,
    planned: dict[int, Planned] | None = None,
    real: Collection[int] = (),
    collected: bool = False,
) -> Committed:
    """From the receipts of all ranks to the encoded record, as rank 0 does it.

    Planned for real are of each pipeline stage the first three data-parallel ranks of its first tensor-parallel rank,
    and the ranks `real`; the receipts of the others are those of these, under other numbers. `planned`: those that
    have been planned before; more come to them. `collected`: with Python's collector on.
    """
    planned = {} if planned is None else planned
    block = mesh.tp * mesh.pp
    messages: list[str] = []
    for rank in range(mesh.ranks):
        dp, shard = divmod(rank, block)
        like = min(dp, 2) * block + shard - shard % mesh.tp
        own = rank if rank in real else like
        if own not in planned:
            planned[own] = plan_rank(mesh, model, own, again=1)
        messages.append(_numbered(planned[own].receipt, rank, mesh))
    with collecting(collected):
        return _commit((mesh, model), messages, planned)


def _numbered(receipt: Receipt, rank: int, mesh: Mesh) -> str:
    """The message of this rank, if it has done what that one did."""
    shard, before = rank % (mesh.tp * mesh.pp), receipt.shard
    text = json.dumps(receipt.encode())
    if receipt.rank != rank:
        text = text.replace(f"rank_{receipt.rank}.pt", f"rank_{rank}.pt")
        for kind in ("model", "replicated"):
            text = text.replace(f"{kind}.{before}.pt", f"{kind}.{shard}.pt")
    content = json.loads(text)
    content |= {"rank": rank, "shard": shard}
    content["alike"] = {group: f"{len(group):032x}" for group in content["alike"]}  # else that of another shard's file
    for file in content["files"]:
        file |= {"writer": rank, "crc32": _some_crc(rank, 0)}
        if receipt.rank != rank:  # of a file that nobody opens
            file["index"][2], file["tree"][2] = _some_crc(rank, 1), _some_crc(rank, 2)
    return json.dumps(content)


def _some_crc(rank: int, number: int) -> str:
    """As hard to compress as a true one."""
    return f"{zlib.crc32(f'{rank} {number}'.encode()):08x}"


def _commit(job: tuple[Mesh, Model], messages: Sequence[str], planned: dict[int, Planned]) -> Committed:
    seconds: dict[str, float] = {}
    receipts, seconds["decode"] = timed(lambda: [decode_receipt(json.loads(message)) for message in messages])
    differing, seconds["compare"] = timed(lambda: disagreements(receipts))
    if differing:
        raise RuntimeError(f"the simulated ranks differ in {differing[:3]}")
    plans = {one.receipt.table: one.plan for one in planned.values()}
    ranks: dict[str, list[int]] = {}
    for receipt in receipts:
        ranks.setdefault(receipt.table, []).append(receipt.rank)
    of = [
        (list(plans[digest].meshes), list(plans[digest].layouts), replace(plans[digest].table, ranks=tuple(those)))
        for digest, those in ranks.items()
    ]
    merged, seconds["tables"] = timed(lambda: merge_tables(of))

    def compose() -> Manifest:
        check_agreed(merged.tables, merged.layouts)
        return compose_manifest(100, "0" * 20, "2026-11-27T00:00:00.000+00:00", receipts, merged, {})

    manifest, seconds["compose"] = timed(compose)
    record, seconds["encode"] = timed(lambda: encode_manifest(manifest))
    told = len(zlib.compress(record, 1))
    return Committed(*job, manifest, record, told, sum(map(len, messages)), seconds, planned)


def timed(work: Callable[[], _T]) -> tuple[_T, float]:
    """What it gives, and the processor time of this thread: on a shared machine the clock would count others' work."""
    began = time.thread_time()
    result = work()
    return result, time.thread_time() - began


@contextmanager
def collecting(on: bool) -> Iterator[None]:
    """With Python's collector, or without."""
    if on:
        yield
    else:
        with uncollected():
            yield
