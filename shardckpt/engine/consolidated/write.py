"""Write the consolidated model file, all ranks together: the phases, and what is removed when one of them fails."""

from __future__ import annotations

import contextlib
import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from torch import nn

from shardckpt.engine.consolidated.assembling.assemble import assemble
from shardckpt.engine.consolidated.assembling.notes import Contents, Notes, differing, read_notes
from shardckpt.engine.consolidated.assembling.reading import Parts
from shardckpt.engine.consolidated.assembling.whole import Kind, Whole
from shardckpt.engine.consolidated.fragments import contents, is_direct
from shardckpt.engine.consolidated.holding import FlatPiece, Holding, holding_of
from shardckpt.engine.consolidated.inventory import Inventory
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.patience import within
from shardckpt.errors import CheckpointDamagedError, CheckpointSaveError
from shardckpt.format.checksum import all_from_hex, crc32, to_hex
from shardckpt.format.layout import model_file
from shardckpt.format.record.files import Extent, FileEntry, decode_file, encode_file
from shardckpt.gang.announce import announce
from shardckpt.gang.base import Gang
from shardckpt.gang.together import together_gather
from shardckpt.storage.base import Buffer, Read, Storage

_log = logging.getLogger(__name__)


def write_consolidated(
    storage: Storage,
    gang: Gang,
    at: Coordinates,
    *,
    model: nn.Module,
    prefix: str,
    step: int,
    timeout: timedelta,
    model_key: str = "model",
) -> FileEntry | None:
    """Write `<prefix>/model.pt`: the model's full state, whole tensors under their plain names, in one archive.

    Called by all ranks of the gang, each on one thread, in a conversation that they have entered; the model must not
    change until it returns. `gang` numbers the ranks as `torch.distributed` does. Gives the file's entry for the record
    on rank 0, None elsewhere. Each phase ends on all ranks with success or with the same error: a `GangError` with
    what failed where, or a `CheckpointSaveError` that names tensors of which ranks hold different values. Then there is
    neither the file nor a temporary one.

    The file holds `{model_key: state, "model_key": model_key}`. Values that differ between ranks (extra state of
    modules) are those of the first rank that has them; this is logged.
    """
    return _Consolidation(storage, gang, at, prefix=prefix, step=step, timeout=timeout).run(model, model_key)


@dataclass(frozen=True, slots=True)
class _Told:
    """What rank 0 heard of one rank's holding."""

    inventory: str
    flat: Sequence[FlatPiece]
    alike: dict[str, str]
    values: dict[str, str]

    @classmethod
    def decode(cls, content: Any) -> _Told:
        flat = [FlatPiece(n, d, tuple(s), h, tuple(o), tuple(k)) for n, d, s, h, o, k in content["flat"]]
        return cls(content["inventory"], flat, content["alike"], content["values"])


@dataclass(frozen=True, slots=True)
class _Written:
    """What one rank has written: the sums of its fragments in order, and where in its file its notes lie."""

    sums: array[int]
    notes: Extent | None

    @classmethod
    def decode(cls, content: Any) -> _Written:
        text, notes = content
        return cls(array("I", all_from_hex(text, len(text) // 8)), None if notes is None else tuple(notes))


class _Consolidation:
    """One file, once. All methods on all ranks, unless they say otherwise."""

    def __init__(
        self, storage: Storage, gang: Gang, at: Coordinates, *, prefix: str, step: int, timeout: timedelta
    ) -> None:
        self._storage = storage
        self._gang = gang
        self._rank = at.rank
        self._prefix = prefix
        self._step = step
        self._timeout = timeout
        self._told: list[_Told] = []
        """On rank 0, by rank."""

    def run(self, model: nn.Module, model_key: str) -> FileEntry | None:
        holding = self._take_stock(model, model_key)
        kinds = self._kinds(holding)
        self._compare(holding)
        tellers = announce(self._gang, lambda: [kind.teller for kind in kinds], phase="plan the file", **self._terms)
        try:
            written: Any = together_gather(
                self._gang, lambda: self._put(holding, tells=self._rank in tellers), phase="write parts", **self._terms
            )

            def put_together() -> Any:
                work = [_Written.decode(each) for each in written]
                what = "putting the model together"
                return encode_file(
                    within(self._timeout, lambda: self._assemble(holding, kinds, work, model_key), what=what)
                )

            entry = announce(self._gang, put_together, phase="put the model together", **self._terms)
        except BaseException:
            self._remove()
            raise
        return decode_file(entry) if self._rank == 0 else None

    def _take_stock(self, model: nn.Module, model_key: str) -> Holding:
        """What this rank holds; rank 0 hears of what all do."""
        holdings: list[Holding] = []

        def look() -> Any:
            holdings.append(holding_of(model, model_key))
            return holdings[0].announcement()

        told = together_gather(self._gang, look, phase="look at the model", **self._terms)
        self._told = [_Told.decode(each) for each in told or ()]
        return holdings[0]

    def _kinds(self, holding: Holding) -> list[Kind]:
        """On rank 0 the inventories that there are, each with the ranks that have it; each is sent by one rank."""
        ranks_of: dict[str, list[int]] = {}
        for rank, told in enumerate(self._told):
            ranks_of.setdefault(told.inventory, []).append(rank)
        unknown = [ranks[0] for ranks in ranks_of.values() if ranks[0] != 0]
        asked = announce(self._gang, lambda: unknown, phase="plan the file", **self._terms)
        if not asked:
            return [Kind(holding.inventory, tuple(ranks)) for ranks in ranks_of.values()]

        def own() -> Any:
            return holding.inventory.encode() if self._rank in asked else None

        sent: Any = together_gather(self._gang, own, phase="plan the file", **self._terms)
        return [
            Kind(Inventory.decode(sent[ranks[0]]) if ranks[0] else holding.inventory, tuple(ranks))
            for ranks in ranks_of.values()
        ]

    def _compare(self, holding: Holding) -> None:
        """`CheckpointSaveError` on all ranks if two hold different values of what they are taken to hold alike."""
        doubtful = announce(self._gang, self._doubtful, phase="compare", **self._terms)
        if not doubtful:
            return

        def held() -> Any:
            return [
                [group, dict(held)]
                for group, held in holding.alike.items()
                if [holding.inventory.digest, group] in doubtful
            ]

        gathered: Any = together_gather(self._gang, held, phase="compare", **self._terms)
        message = announce(self._gang, lambda: self._explain(gathered), phase="compare", **self._terms)
        raise CheckpointSaveError(f"step {self._step}: {message}", step=self._step)

    def _doubtful(self) -> list[list[str]]:
        """On rank 0: the groups whose ranks do not all have one digest."""
        seen: dict[tuple[str, str], set[str]] = {}
        for told in self._told:
            for group, digest in told.alike.items():
                seen.setdefault((told.inventory, group), set()).add(digest)
        return [list(group) for group, digests in seen.items() if len(digests) > 1]

    def _explain(self, gathered: Sequence[Any]) -> str:
        """On rank 0: which tensors differ between which ranks, and what to do."""
        seen: dict[tuple[str, str, str], dict[str, int]] = {}
        for rank, groups in enumerate(gathered):
            for group, held in groups:
                for name, digest in held.items():
                    seen.setdefault((name, group, self._told[rank].inventory), {}).setdefault(digest, rank)
        pairs = {key[0]: sorted(ranks.values())[:2] for key, ranks in sorted(seen.items()) if len(ranks) > 1}
        lines = [f"{name} (for example ranks {ranks[0]} and {ranks[1]})" for name, ranks in sorted(pairs.items())]
        more = f"; and {len(lines) - 10} more" if len(lines) > 10 else ""
        return (
            "ranks hold different values of tensors of which the consolidated model has but one: "
            f"{'; '.join(lines[:10])}{more}. Bring the ranks into step, or, if each has a part of it, make it a "
            "DTensor that says so"
        )

    def _put(self, holding: Holding, *, tells: bool) -> Any:
        """Write this rank's file, unless it is rank 0, which needs none."""
        fragments = holding.written(plain=tells)
        sums = "".join(to_hex(holding.sums[fragment.name, fragment.offsets]) for fragment in fragments)
        if self._rank == 0 or not (fragments or tells):
            return [sums, None]
        nbytes = sum(fragment.nbytes for fragment in fragments)
        notes = holding.notes if tells else b""

        def parts() -> Iterable[Buffer]:
            for fragment in fragments:
                yield from contents(fragment)
            if notes:
                yield notes

        # A list can be put again after a passing failure; but copies of tensors are not all kept at once.
        ready = all(is_direct(fragment.tensor) for fragment in fragments)
        put = list(parts()) if ready else parts()
        within(self._timeout, lambda: self._storage.put(self._file(self._rank), put), what="writing the parts")
        return [sums, [nbytes, len(notes), crc32(notes)] if tells else None]

    def _assemble(
        self, holding: Holding, kinds: Sequence[Kind], written: Sequence[_Written], model_key: str
    ) -> FileEntry:
        """On rank 0."""
        for name in differing(told.values for told in self._told):
            _log.warning("%s differs between ranks; the consolidated model has what the first of them holds", name)
        whole = Whole(kinds, [told.flat for told in self._told])
        sums = [each.sums for each in written]
        tensors = [replace(tensor, sources=()) for tensor in whole.tensors(sums)]
        notes = [self._notes(kind.teller, holding, written) for kind in kinds]
        inside = Contents(notes, tensors, model_key)
        own = {(fragment.name, fragment.offsets): fragment.tensor for fragment in holding.fragments}
        parts = Parts(self._storage, self._file, own)
        entry = assemble(
            parts, self._target, tensors=tensors, sources=whole.tensors(sums), tree=inside.tree, boxes=inside.boxes
        )
        self._storage.delete(self._file(rank) for rank in range(1, self._gang.size))
        return entry

    def _notes(self, rank: int, holding: Holding, written: Sequence[_Written]) -> Notes:
        extent = written[rank].notes
        if rank == 0 or extent is None:
            return read_notes(holding.notes)
        at, nbytes, crc = extent
        content = bytearray(nbytes)
        self._storage.read_into([Read(self._file(rank), at, memoryview(content))])
        if crc32(content) != crc:
            raise CheckpointDamagedError(
                f"{self._file(rank)} in {self._storage.url} does not hold what rank {rank} has just written: save "
                "again, and test the storage"
            )
        return read_notes(bytes(content))

    def _remove(self) -> None:
        """After a failure: what this rank has written; raises nothing. A write that hangs may leave more."""
        keys = [self._file(self._rank)]
        if self._rank == 0:
            keys = [self._target, *(self._file(rank) for rank in range(1, self._gang.size))]
        with contextlib.suppress(OSError):
            within(self._timeout, lambda: self._storage.delete(keys), what="removing the parts")

    def _file(self, rank: int) -> str:
        return f"{self._prefix}/{model_file(0, 1)}.part_{rank}"

    @property
    def _target(self) -> str:
        return f"{self._prefix}/{model_file(0, 1)}"

    @property
    def _terms(self) -> dict[str, Any]:
        return {"timeout": self._timeout, "step": self._step}
