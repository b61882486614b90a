"""Plan a save: which tensor of this rank's state goes into which file, decided by this rank alone.

Which file (DESIGN "On disk"): model state that data-parallel ranks hold alike -> `model.<shard>.pt`; other state that
they hold alike (declared, or the plain state of an optimizer) -> `replicated.<shard>.pt`; all else -> `rank_<r>.pt`.
`model.<shard>.pt` is the whole model state of its shard or it is not there: of a model that is sharded between
data-parallel ranks, what these do hold alike (buffers) lies in `replicated.<shard>.pt`.

What is said to be frozen lies apart from all that, in `frozen.<shard>.pt` or `frozen_rank_<r>.pt`, which are blobs: put
once, and referred to by later steps. `model.<shard>.pt` is then the whole of what is not frozen.

Files that data-parallel ranks hold alike are planned by all of them, who share the writing. Of a sharded tensor that
several ranks hold alike (HSDP), one replica writes each shard; the replicas share the work evenly. Nothing is
communicated: every rank comes to the same decisions from placements, shapes and order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.saving.draft import Draft, PlannedRecord, Turns, memory_of, prune, record_number, take_value
from shardckpt.engine.sharding import Sharding, check_tensor, describe
from shardckpt.engine.splits.pieces import Shape, joined
from shardckpt.errors import InvalidStateError
from shardckpt.format.index import ITEMSIZE, StoredBox
from shardckpt.format.layout import MODEL_KEY, rank_file
from shardckpt.format.manifest import OF_RANK, Home, LayoutEntry, MeshEntry, Table, TensorEntry
from shardckpt.format.placement import Box
from shardckpt.format.record.homes import home_file
from shardckpt.format.tree import (
    SpelledTree,
    TensorRef,
    UnsafeValueError,
    ValueRef,
    map_leaves,
    spell_tree,
)
from shardckpt.split import Split
from shardckpt.state import Part, Path, join_path, put_together


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file that this rank writes. `boxes` name records by their position in `records`."""

    name: str
    home: Home
    records: tuple[PlannedRecord, ...]
    boxes: tuple[StoredBox, ...]
    tree: SpelledTree
    """The nested state of this file. Its values are spelled already: training goes on, and may change them."""
    values: tuple[str, ...] = ()
    """Keys of `tree.values`."""
    sharers: int = 1
    """How many ranks plan this very file, and share the writing."""
    place: int = 0
    """Of this rank among them."""


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What this rank writes, what it holds (`table`, with its `meshes` and `layouts`), and what it leaves to others.

    `values` has a digest of each Python value, by key.

    `alike` are the tensors of this rank that are taken to be the same as what another rank writes in its own file, in
    groups that all their holders have alike; `copied` names those that this rank writes for others. All holders sum
    them up, and what is in files that they share, so that a difference is found and never lost.
    """

    files: tuple[FilePlan, ...]
    meshes: tuple[MeshEntry, ...]
    layouts: tuple[LayoutEntry, ...]
    table: Table
    values: Mapping[str, str]
    alike: Mapping[str, tuple[tuple[str, torch.Tensor], ...]]
    copied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict, compare=False)
    """What others have worked out of `table`, `meshes` and `layouts`, which stay the same from save to save."""


def plan_save(
    parts: Sequence[Part],
    coordinates: Coordinates,
    *,
    model_key: str = "model",
    replicated: Collection[str] = (),
    frozen: Collection[str] = (),
) -> SavePlan:
    """Decide for every tensor and value of the state. `InvalidStateError` names a key that cannot be stored.

    `frozen`: the names of the tensors that are put once.
    """
    planner = _Planner(coordinates, model_key, (frozenset(replicated), frozenset(frozen)))
    for step in (planner.look_at, planner.add):
        for part in parts:
            try:
                step(part)
            except UnsafeValueError as error:
                raise InvalidStateError(f"{part.key}: {error}") from error
    return planner.finish(put_together(list(parts)))


class _Planner:
    def __init__(
        self, coordinates: Coordinates, model_key: str, declared: tuple[frozenset[str], frozenset[str]]
    ) -> None:
        self._at = coordinates
        self._model_key = model_key
        self._replicated, self._frozen = declared
        self._meshes: dict[MeshEntry, int] = {}
        self._layouts: dict[LayoutEntry, int] = {}
        self._tensors: dict[str, TensorEntry] = {}
        self._values: dict[str, Home] = {}
        self._value_of: dict[str, str] = {}
        self._drafts: dict[Home, Draft] = {}
        self._turns = Turns()
        self._alike: dict[str, list[tuple[str, torch.Tensor]]] = {}
        self._copied: dict[str, list[str]] = {}
        self._model_is_alike = True

    def look_at(self, part: Part) -> None:
        """All parts, before any is added: do the ranks of this shard hold the whole model alike?"""
        if part.path[0] == MODEL_KEY:
            raise InvalidStateError(f"{part.key}: {MODEL_KEY!r} is what the files call the model's entry; rename yours")
        if part.path[0] == self._model_key and part.rules is not None:
            self._model_is_alike = False  # on all ranks, also on one that has no part of anything
        if part.path[0] != self._model_key or self._at.dp_size == 1:
            return

        def look(path: Path, leaf: Any) -> None:
            name = join_path(path)
            if isinstance(leaf, torch.Tensor) and not self._is_alike(part, describe(name, leaf)):
                self._model_is_alike &= name in self._frozen

        map_leaves(part.tree, look, part.path)

    def add(self, part: Part) -> None:
        def visit(path: Path, value: Any) -> None:
            name = join_path(path)
            if name in self._tensors or name in self._values:
                raise InvalidStateError(f"two entries of the state are both called {name!r}; rename one of them")
            if isinstance(value, torch.Tensor):
                self._add_tensor(part, path, name, value)
            else:
                self._add_value(part, path, name, value)

        map_leaves(part.tree, visit, part.path)

    def finish(self, tree: Any) -> SavePlan:
        files = tuple(self._finish_file(home, draft, tree) for home, draft in self._drafts.items() if draft.leaves)
        table = Table((self._at.rank,), self._tensors, self._values)
        alike = {name: tuple(tensors) for name, tensors in self._alike.items()}
        copied = {group: tuple(names) for group, names in self._copied.items()}
        return SavePlan(files, tuple(self._meshes), tuple(self._layouts), table, self._value_of, alike, copied)

    def _add_tensor(self, part: Part, path: Path, name: str, tensor: torch.Tensor) -> None:
        dtype = check_tensor(name, tensor)
        rule = part.rules.get(name) if part.rules else None
        if isinstance(rule, Split) and tensor.numel():
            self._add_piece(path, name, (tensor, dtype), rule)
            return
        sharding = describe(name, tensor)
        alike = rule is None and self._is_alike(part, sharding)
        home = self._frozen_home(alike) if name in self._frozen else self._home_of(path, alike)
        if sharding is None or home not in OF_RANK:
            replica, mine = 0, True
        else:
            replica = self._choose_replica(home, sharding, tensor, dtype)
            mine = replica == sharding.replica
        layout = self._layout_of(home, sharding)
        self._tensors[name] = TensorEntry(dtype, tuple(tensor.shape), layout, replica)
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if mine:
            shape = tuple(tensor.shape)
            zeros = (0,) * len(shape)
            boxes = sharding.boxes(shape) if sharding is not None else (Box(zeros, shape, zeros),)
            self._store(home, path, name, (shape, local, dtype), boxes)
        if home in OF_RANK and sharding is not None and sharding.assumed and sharding.replicas > 1:
            file = self._file_name(home, sharding.writer(replica))
            self._note_copy(name, local, f"{file} {sharding.mesh.dims} {sharding.placements}", mine=mine)

    def _add_piece(self, path: Path, name: str, what: tuple[torch.Tensor, str], split: Split) -> None:
        """A part of a whole because the user says so. Of data-parallel ranks, which hold it alike, one writes it: the
        one of the same number for all parts. Frozen ones go with what is not."""
        tensor, dtype = what
        whole = joined(name, tensor, split, self._at)
        nbytes = math.prod(whole.shape) * ITEMSIZE[dtype]
        chosen = self._turns.choose("split", self._at.dp_size, nbytes, memory_of(tensor, dtype))
        pieces = whole.pieces(ranks[chosen] for ranks in self._at.stage or (self._at.dp_ranks,))
        number = self._layouts.setdefault(LayoutEntry("rank", pieces=pieces), len(self._layouts))
        self._tensors[name] = TensorEntry(dtype, whole.shape, number)
        writer = self._at.dp_ranks[chosen]
        if writer == self._at.rank:
            self._store("rank", path, name, (whole.shape, tensor, dtype), whole.boxes)
        if self._at.dp_size > 1:
            self._note_copy(name, tensor, f"{rank_file(writer)} split", mine=writer == self._at.rank)

    def _note_copy(self, name: str, local: torch.Tensor, group: str, *, mine: bool) -> None:
        """Copies that are only taken to be alike are compared: by the file that holds them, and the layout."""
        if mine:
            self._copied.setdefault(group, []).append(name)
        else:
            self._alike.setdefault(group, []).append((name, local.detach()))

    def _add_value(self, part: Part, path: Path, name: str, value: Any) -> None:
        spelled, self._value_of[name] = take_value(name, value)
        declared = not self._replicated.isdisjoint((path[0], "*"))
        home: Home = "rank"
        if path[0] == self._model_key and self._model_is_alike and (self._at.dp_size == 1 or declared):
            home = "model"
        elif declared:
            home = "replicated"
        self._values[name] = home
        draft = self._draft(home)
        draft.leaves[path] = ValueRef(len(draft.values))
        draft.values.append(name)
        draft.spelled.append(spelled)

    def _is_alike(self, part: Part, sharding: Sharding | None) -> bool:
        """Whether the ranks of this shard hold this tensor alike, by its placements or by what it belongs to."""
        if sharding is not None:
            return sharding.is_alike_on(self._at.dp_ranks)
        declared = not self._replicated.isdisjoint((part.path[0], "*"))
        return declared or self._at.dp_size == 1 or part.kind in ("module", "optimizer")

    def _home_of(self, path: Path, alike: bool) -> Home:
        if not alike:
            return "rank"
        if path[0] == self._model_key and self._model_is_alike:
            return "model"
        declared = not self._replicated.isdisjoint((path[0], "*"))
        return "replicated" if declared or self._at.dp_size > 1 else "rank"

    def _frozen_home(self, alike: bool) -> Home:
        return "frozen" if alike else "frozen_rank"

    def _choose_replica(self, home: Home, sharding: Sharding, tensor: torch.Tensor, dtype: str) -> int:
        """The same choice on every rank, since all see the same tensors in the same order. Ties are seen by the memory,
        and so heeded only where every rank has some of it. Of what is frozen it is the same in every save, too,
        whatever else there is in the state by then."""
        shape = tuple(tensor.shape)
        kind = (home, self._mesh_number(sharding), sharding.placements)
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        memory = (shape, *memory_of(local, dtype)) if sharding.replicas > 1 and local.numel() else None
        if self._turns.is_tied(kind, memory) and not sharding.is_everywhere(shape):
            memory = None
        return self._turns.choose(kind, sharding.replicas, math.prod(shape) * ITEMSIZE[dtype], memory)

    def _layout_of(self, home: Home, sharding: Sharding | None) -> int:
        if sharding is None:
            layout = LayoutEntry(home)
        else:
            layout = LayoutEntry(home, self._mesh_number(sharding), sharding.placements, given=sharding.given)
        return self._layouts.setdefault(layout, len(self._layouts))

    def _mesh_number(self, sharding: Sharding) -> int:
        return self._meshes.setdefault(sharding.mesh, len(self._meshes))

    def _store(
        self, home: Home, path: Path, name: str, what: tuple[Shape, torch.Tensor, str], boxes: Sequence[Box]
    ) -> None:
        shape, local, dtype = what
        draft = self._draft(home)
        number = record_number(draft, local, dtype)
        if sum(math.prod(box.lengths) for box in boxes) != local.numel():
            raise InvalidStateError(
                f"{name} cannot be stored: its local tensor of shape {list(local.shape)} is not what its placements "
                "say this rank holds; make it with distribute_tensor, or with from_local and its true shape and stride"
            )
        draft.boxes += [StoredBox(name, number, shape, box) for box in boxes]
        draft.leaves[path] = TensorRef(number, local.dtype, tuple(local.shape))

    def _draft(self, home: Home) -> Draft:
        return self._drafts.setdefault(home, Draft())

    def _file_name(self, home: Home, rank: int) -> str:
        return home_file(home, rank, self._at.shard, self._at.shards)

    def _finish_file(self, home: Home, draft: Draft, tree: Any) -> FilePlan:
        content = prune(tree, draft.leaves)
        of_model = home not in ("rank", "replicated") or (home == "rank" and not self._model_is_alike)
        if self._model_key in content and of_model:
            content[MODEL_KEY] = self._model_key  # as fairseq2 does: whoever opens the file finds the model by it
        name, sharers, place = self._file_name(home, self._at.rank), 1, 0
        if home not in OF_RANK:
            sharers, place = self._at.dp_size, self._at.dp_ranks.index(self._at.rank)
        records, boxes, spelled = tuple(draft.records), tuple(draft.boxes), spell_tree(content, draft.spelled)
        return FilePlan(name, home, records, boxes, spelled, tuple(draft.values), sharers, place)
