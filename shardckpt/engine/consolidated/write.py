"""Write the consolidated model file, all ranks together: the phases, and what is removed when one of them fails."""

from __future__ import annotations

import contextlib
import logging
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import nn

from shardckpt.engine.committing.commit import check_room
from shardckpt.engine.consolidated.assembling.assemble import Archive
from shardckpt.engine.consolidated.assembling.notes import Contents, Notes, differing, read_notes
from shardckpt.engine.consolidated.assembling.reading import Parts
from shardckpt.engine.consolidated.assembling.whole import Kind, Whole, WholeTensor
from shardckpt.engine.consolidated.fragments import contents, is_direct
from shardckpt.engine.consolidated.holding import Holding
from shardckpt.engine.consolidated.stock import Stock
from shardckpt.engine.consolidated.stretches import (
    Terms,
    check,
    finish_upload,
    is_worth_it,
    put_stretch,
    without_sources,
)
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.patience import within
from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.archive import Tail
from shardckpt.format.checksum import all_from_hex, crc32, to_hex
from shardckpt.format.index import ITEMSIZE
from shardckpt.format.layout import model_file
from shardckpt.format.record.files import Extent, FileEntry, decode_file, encode_file
from shardckpt.gang.announce import announce
from shardckpt.gang.base import Gang
from shardckpt.gang.together import together_gather
from shardckpt.storage.base import Buffer, Read, RenamingStorage, SharedPuts, Storage, UploadId

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

    A large one is put by all ranks, each a stretch, where the storage can do that; else by rank 0.

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
        self._stock = Stock(gang, step=step, timeout=timeout)
        self._upload: UploadId = ""
        """On rank 0, of the file."""

    def run(self, model: nn.Module, model_key: str) -> FileEntry | None:
        self._stock.take(model, model_key)
        holding, kinds = self._stock.holding, self._stock.kinds
        plan = announce(self._gang, lambda: self._plan(kinds), phase="plan the file", **self._terms)
        tells, by_all, only_one = self._rank in plan["tellers"], plan["by all"], len(plan["tellers"]) == 1
        try:
            written: Any = together_gather(
                self._gang,
                lambda: self._put(holding, tells=tells, by_all=by_all, only_one=only_one),
                phase="write parts",
                **self._terms,
            )
            work = [_Written.decode(each) for each in written or ()]
            if by_all:
                entry = self._put_by_all(holding, kinds, work, model_key)
            else:
                entry = self._on_rank_0(lambda: self._assemble(holding, kinds, work, model_key))
        except BaseException:
            self._remove()
            raise
        return decode_file(entry) if self._rank == 0 else None

    def _plan(self, kinds: Sequence[Kind]) -> Any:
        """On rank 0: who tells of each kind, and whether all ranks put the file."""
        whole = Whole(kinds, [told.flat for told in self._stock.told])
        nbytes = sum(math.prod(shape) * ITEMSIZE[dtype] for _, dtype, shape in whole.described())
        by_all = is_worth_it(self._storage, nbytes, self._gang.size)
        if by_all and isinstance(self._storage, RenamingStorage):
            self._storage.make_folder(self._prefix, exist_ok=True)  # where the others look for it
        return {"tellers": [kind.teller for kind in kinds], "by all": by_all}

    def _on_rank_0(self, work: Callable[[], FileEntry]) -> Any:
        def bounded() -> Any:
            return encode_file(within(self._timeout, work, what="putting the model together"))

        return announce(self._gang, bounded, phase="put the model together", **self._terms)

    def _put_by_all(self, holding: Holding, kinds: Sequence[Kind], written: Sequence[_Written], model_key: str) -> Any:
        """Each rank its stretch of the file."""
        tensors: list[WholeTensor] = []
        tails: list[Tail] = []

        def plan() -> Any:
            flat = [told.flat for told in self._stock.told]
            whole = Whole(kinds, flat, plain_in_files=len(kinds) > 1)
            tensors.extend(without_sources(whole.tensors([each.sums for each in written])))
            inside = self._contents(holding, kinds, written, tensors, model_key)
            tails.append(Archive(tensors).tail(inside.tree, inside.boxes))
            if isinstance(self._storage, SharedPuts):
                self._upload = self._storage.begin_upload(self._target)
            return Terms.encode(kinds, flat, tensors, self._upload)

        terms = announce(
            self._gang, lambda: within(self._timeout, plan, what="planning the file"), phase="plan the file",
            **self._terms,
        )  # fmt: skip

        def put() -> Any:
            own = {(fragment.name, fragment.offsets): fragment.tensor for fragment in holding.fragments}
            parts, tail = Parts(self._storage, self._file, own, self._rank), tails[0] if tails else None
            ranks = self._gang.size
            return within(
                self._timeout,
                lambda: put_stretch(parts, self._target, Terms.decode(terms), ranks=ranks, tail=tail),
                what="putting the model together",
            )

        told: Any = together_gather(self._gang, put, phase="put the model together", **self._terms)

        def finish() -> FileEntry:
            check(told, tensors, self._storage.url)
            finish_upload(self._storage, self._target, self._upload, told)
            self._storage.delete(self._file(rank) for rank in range(self._gang.size))
            return Archive(tensors).entry(self._target, tails[0])

        return self._on_rank_0(finish)

    def _put(self, holding: Holding, *, tells: bool, by_all: bool, only_one: bool) -> Any:
        """Write this rank's file; rank 0 needs none if it alone puts the model together, and what all hold is in none
        if all do. `only_one`: whether all ranks are of one kind."""
        if by_all and self._rank:
            check_room(self._storage, self._prefix)  # or it would put its stretch on a disk of its own
        summed = holding.written(plain=tells)
        fragments = holding.written(plain=False) if by_all and only_one else summed
        sums = "".join(to_hex(holding.sums[fragment.name, fragment.offsets]) for fragment in summed)
        if (self._rank == 0 and not by_all) or not (fragments or tells):
            return [sums, None]
        nbytes = sum(fragment.nbytes for fragment in fragments)
        notes = holding.notes if tells and self._rank != 0 else b""
        if not (fragments or notes):
            return [sums, None]

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
        """On rank 0, alone."""
        whole = Whole(kinds, [told.flat for told in self._stock.told])
        sums = [each.sums for each in written]
        tensors = without_sources(whole.tensors(sums))
        inside = self._contents(holding, kinds, written, tensors, model_key)
        own = {(fragment.name, fragment.offsets): fragment.tensor for fragment in holding.fragments}
        archive, parts = Archive(tensors), Parts(self._storage, self._file, own)
        tail, partly = archive.tail(inside.tree, inside.boxes), dict[str, int]()

        def windows() -> Iterator[Buffer]:
            yield from archive.windows(parts, whole.tensors(sums), (0, archive.layout.tail), partly=partly)
            yield tail.content

        entry, nbytes = archive.entry(self._target, tail), self._storage.put(self._target, windows())
        assert nbytes == entry.nbytes, f"{self._target}: {nbytes} bytes were put of {entry.nbytes}"
        self._storage.delete(self._file(rank) for rank in range(1, self._gang.size))
        return entry

    def _contents(
        self,
        holding: Holding,
        kinds: Sequence[Kind],
        written: Sequence[_Written],
        tensors: Sequence[WholeTensor],
        model_key: str,
    ) -> Contents:
        """On rank 0: what stands where in the file."""
        for name in differing(told.values for told in self._stock.told):
            _log.warning("%s differs between ranks; the consolidated model has what the first of them holds", name)
        notes = [self._notes(kind.teller, holding, written) for kind in kinds]
        return Contents(notes, tensors, model_key)

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
            keys = [self._target, *(self._file(rank) for rank in range(self._gang.size))]
        if self._upload and isinstance(self._storage, SharedPuts):
            self._storage.abort_upload(self._target, self._upload)
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
