"""One committed step of ours as a source of whole tensors, wherever it lies and on whichever ranks it was saved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.dcp.reading import told_as_load_errors
from shardckpt.engine.garbage import uncollected
from shardckpt.engine.loading.contents import Contents, merge
from shardckpt.engine.loading.fetching.fetch import check_region, find_stored
from shardckpt.engine.loading.integrity import Region
from shardckpt.engine.loading.sources import Sources
from shardckpt.engine.saving.draft import prune
from shardckpt.errors import CheckpointDamagedError, CheckpointNotFoundError
from shardckpt.format.layout import CONSOLIDATED, parse_step
from shardckpt.format.manifest import HOMES, Manifest, TensorEntry
from shardckpt.format.tree import map_leaves
from shardckpt.run.catalog import Catalog, Entry
from shardckpt.state import Path, join_path
from shardckpt.storage.base import Storage
from shardckpt.tools.moving.reading.coverage import PartlyRead
from shardckpt.tools.moving.reading.fill import Filler
from shardckpt.tools.moving.reading.spread import Piece, Spread
from shardckpt.tools.moving.seam import TensorFacts, TensorName, Window
from shardckpt.tools.place import Place, Where, opened

BUDGET = 64 << 20


class StepSource:
    """A committed step as a `TensorSource`: sharded, in pieces, consolidated or reduced to its model. One process.

    Values, and tensors of which each rank held its own (`differ`), are those of one rank, the first unless another is
    named; what that rank did not have comes from the first that did. A tensor that only the consolidated file has
    comes from there. Ties are known where every file that has pieces of them holds the bytes once.

    What is checked: the record's digest, indexes and trees before they are believed, and each tensor when the last of
    its bytes has been read, in whatever windows and order: then every record that it fills is held against its CRC. Not
    checked is what is read of a tensor that is never read to its end, or read again before that, and the bytes around
    the tensors (`verify` looks at those). It holds the indexes of all files in which its tensors lie, and beside the
    windows at most `budget_nbytes` for each thread that reads.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        manifest: Manifest,
        *,
        part: str | None = None,
        rank: int = 0,
        budget_nbytes: int = BUDGET,
    ) -> None:
        """`part`: only what is below this key of the state. `ValueError` if there was no such rank. Closes no storage.

        Errors as of a load: `CheckpointDamagedError`, `CheckpointLoadError`.
        """
        if not 0 <= rank < manifest.world_size:
            raise ValueError(f"step {manifest.step} was saved by ranks 0 to {manifest.world_size - 1}, not by {rank}")
        self.storage, self.folder, self.manifest, self.rank = storage, folder, manifest, rank
        self._part = part
        self._at = Coordinates(rank, manifest.world_size, manifest.shard_of[rank], manifest.shards, (rank,))
        self._sources = Sources(manifest, self._at)
        self._contents = Contents(storage, folder, manifest)
        self._owned = ExitStack()
        self._filler = Filler(storage, self._contents.key_of, budget_nbytes=budget_nbytes)
        self._owned.callback(self._filler.close)
        self._elsewhere: list[str] = []
        with told_as_load_errors(self.url, manifest.step), uncollected():
            self._known = frozenset(self._sources.names())
            self._names = {name: None for name in self._sources.names() if self._is_meant(name)}
            self._spreads, self._ties = self._find()

    @classmethod
    def open(
        cls,
        where: Where,
        *,
        step: int | None = None,
        part: str | None = None,
        rank: int = 0,
        budget_nbytes: int = BUDGET,
        storage_options: Mapping[str, object] | None = None,
    ) -> StepSource:
        """A step (`.../step_100`), or that step, or else the latest, of a run. To be closed by the caller.

        `CheckpointNotFoundError` if it is not there, or not committed; else as above, and as `open_storage`.
        """
        with ExitStack() as stack:
            place = stack.enter_context(opened(where, storage_options))
            folder, manifest = Catalog(place.storage).record(_entry(place, step))
            source = cls(place.storage, folder, manifest, part=part, rank=rank, budget_nbytes=budget_nbytes)
            source._owned.push(stack.pop_all())
            return source

    @property
    def url(self) -> str:
        """Where it is, without credentials."""
        return f"{self.storage.url.rstrip('/')}/{self.folder}"

    @cached_property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return {name: spread.facts for name, spread in self._spreads.items() if name not in self._ties}

    @property
    def ties(self) -> Mapping[str, str]:
        return self._ties

    @property
    def differ(self) -> tuple[str, ...]:
        """The tensors of which ranks held different ones, so that this source shows only those of one of them."""
        own = frozenset(self.manifest.differ)
        return tuple(name for name in self._spreads if name in own)

    @cached_property
    def tree(self) -> Any:
        with told_as_load_errors(self.url, self.manifest.step), uncollected():
            return self._nested()

    def read(self, windows: Sequence[Window]) -> None:
        with told_as_load_errors(self.url, self.manifest.step):
            try:
                wanted = ((self._spreads[window.name], window) for window in windows)
                damaged = self._filler.fill(wanted)
            except ValueError as error:
                raise self._damaged(str(error)) from error
        if damaged:
            raise self._damaged(f"the bytes of {', '.join(sorted(damaged))} are not those that were written")

    def crc(self, name: str) -> int | None:
        """The CRC of a whole tensor as it was saved, where it follows from those of its records; `read` checks it."""
        return self._spreads[name].crc()

    def take_partly_read(self) -> list[PartlyRead]:
        """Of tensors that this process has read in part: what must be known of it to check them."""
        return self._filler.coverage.take_partly_read()

    def check_together(self, parts: Iterable[PartlyRead]) -> None:
        """Check the tensors that several processes have read in parts. `CheckpointDamagedError`, also if there are
        bytes of them that nobody, or more than one, has read: then they cannot be checked."""
        own, damaged = self._filler.coverage, set[str]()
        for part in parts:
            sums = part.sums
            for span in part.spans:
                damaged |= own.add(self._spreads[part.name], *span, sums)
                sums = {}
        left = own.take_partly_read()
        if damaged or left:
            what = ", ".join(sorted(damaged)) or f"{left[0].name}, read in parts, could not be checked:"
            raise self._damaged(f"the bytes of {what} are not those that were written")

    def close(self) -> None:
        self._owned.close()

    def __enter__(self) -> StepSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_meant(self, name: str) -> bool:
        return self._part is None or name == self._part or name.startswith(f"{self._part}.")

    def _find(self) -> tuple[dict[str, Spread], dict[str, str]]:
        """Where each tensor lies, and which are the same bytes as an earlier one."""
        entries = {name: entry for name in self._names if (entry := self._sources.tensor(name, "first"))}
        chunks = {name: self._sources.chunks(name, "first") for name in entries}
        self._contents.open({file for those in chunks.values() for file, _ in those}, ())
        spreads, ties, first = dict[str, Spread](), dict[str, str](), dict[Any, str]()
        for name, entry in entries.items():
            pieces = [self._piece(name, entry, file, box) for file, box in chunks[name] if all(box.lengths)]
            spreads[name] = Spread(name, TensorFacts(entry.dtype, entry.shape), pieces)
        for name, facts, piece in self._consolidated():
            spreads[name] = Spread(name, facts, [piece] if facts.nbytes else [])
        for name, spread in spreads.items():
            alike = tuple((piece.file, piece.number, piece.local, piece.block) for piece in spread.pieces)
            if alike and first.setdefault((spread.facts, alike), name) != name:
                ties[name] = first[spread.facts, alike]
        return spreads, ties

    def _piece(self, name: str, entry: TensorEntry, file: str, box: Any) -> Piece:
        try:
            stored = find_stored(self._contents.boxes(file), name, box, file)
            record = self._contents.record(file, stored)
            check_region(record, Region(stored.box.local, box.lengths), entry, file=file, name=name)
        except ValueError as error:
            raise self._damaged(str(error)) from error
        return Piece.of(file, stored.record, record, stored.box)

    def _consolidated(self) -> Iterator[tuple[str, TensorFacts, Piece]]:
        """The tensors of the model that the files of the ranks do not have (FSDP1 that was only consolidated)."""
        one = next((file.name for file in self.manifest.files if file.kind == CONSOLIDATED), None)
        if one is None or (self._part is not None and not self.manifest.is_of_model(self._part)):
            return
        self._contents.open([one], [one])
        leaves = self._contents.leaves([one])
        for name, boxes in self._contents.boxes(one).items():
            record = self._contents.record(one, boxes[0])
            is_whole = boxes[0].box.lengths == boxes[0].shape == record.shape
            if name in self._names or not (self.manifest.is_of_model(name) and self._is_meant(name) and is_whole):
                continue
            yield name, TensorFacts(record.dtype, record.shape), Piece.of(one, boxes[0].record, record, boxes[0].box)
        for name in leaves:
            if name not in self._names and self.manifest.is_of_model(name) and self._is_meant(name):
                self._names[name] = None
                self._elsewhere = [one]

    def _nested(self) -> Any:
        left, state = set(self._names), dict[str, Any]()
        for file in self._with_trees(left):
            self._contents.open((), [file])
            tree = self._contents.subtree([file], ()) or {}
            placed = self._placed(tree, left)
            left -= {join_path(path) for path in placed}
            state = merge(state, prune(tree, placed))
        if left:
            raise self._damaged(f"no file says where {min(left)} belongs")
        return state

    def _with_trees(self, left: Collection[str]) -> Iterator[str]:
        """The files that say where things belong: the rank's own, then, for what is still `left`, others'."""
        seen = dict.fromkeys(self._sources.trees_of(self.rank))
        yield from list(seen)
        present = {file.name: None for file in self.manifest.files if file.tree is not None and file.kind in HOMES}
        for name in list(self._names):
            if name in left:
                spread = self._spreads.get(name)
                holding = [piece.file for piece in spread.pieces] if spread is not None else []
                more = [*holding, *self._elsewhere, *self._of_holder(name)]
                for file in [file for file in dict.fromkeys(more) if file not in seen]:
                    seen[file] = None
                    if name in left and (file in present or file in self._elsewhere):
                        yield file
        if left:
            yield from (file for file in present if file not in seen)

    def _of_holder(self, name: str) -> Sequence[str]:
        if name not in self._known:
            return ()
        rank = self._sources.part_rank([name], "first")
        return self._sources.trees_of(rank) if rank is not None else ()

    def _placed(self, tree: Any, names: Collection[str]) -> dict[Path, Any]:
        placed: dict[Path, Any] = {}

        def place(path: Path, leaf: Any) -> None:
            name = join_path(path)
            if name in names and isinstance(leaf, torch.Tensor) == (name in self._spreads):
                placed[path] = TensorName(name) if name in self._spreads else leaf

        map_leaves(tree, place)
        return placed

    def _damaged(self, problem: str) -> CheckpointDamagedError:
        step = self.manifest.step
        return CheckpointDamagedError(f"step {step} at {self.url} is damaged: {problem}", step=step)


def _entry(place: Place, step: int | None) -> Entry:
    """The committed step that is meant."""
    catalog, url = Catalog(place.storage), place.storage.url
    if place.file:
        raise CheckpointNotFoundError(f"{place.file} in {url} is a file, not a run or a step")
    if place.folder:
        own = parse_step(place.folder)
        if own is None or step not in (None, own):
            raise CheckpointNotFoundError(f"{place.folder} in {url} is no committed step{f' {step}' if step else ''}")
        return catalog.entry(own)
    found = catalog.entry(step) if step is not None else catalog.latest()
    if found is None:
        raise CheckpointNotFoundError(f"there is no committed checkpoint in {url}")
    return found
