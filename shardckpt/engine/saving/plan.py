"""Plan a save: which tensor of this rank's state goes into which file, decided by this rank alone.

Which file (DESIGN "On disk"): model state that data-parallel ranks hold alike -> `model.<shard>.pt`; other state that
they hold alike (declared, or the plain state of an optimizer) -> `replicated.<shard>.pt`; all else -> `rank_<r>.pt`.
Of a sharded tensor that several ranks hold alike (HSDP), one replica writes each shard; the replicas share the work
evenly. Nothing is communicated: every rank comes to the same decisions from placements, shapes and order.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.sharding import Sharding, check_tensor, describe
from shardckpt.errors import InvalidStateError
from shardckpt.format.index import ITEMSIZE, StoredBox
from shardckpt.format.layout import model_file, rank_file, replicated_file
from shardckpt.format.manifest import Home, LayoutEntry, MeshEntry, Table, TensorEntry
from shardckpt.format.placement import Box
from shardckpt.format.tree import TensorRef, UnsafeValueError, check_value, map_leaves
from shardckpt.state import Part, Path, join_path, put_together


@dataclass(frozen=True, slots=True)
class PlannedRecord:
    """A tensor of this rank that becomes one record: `tensor` is local (never a DTensor), not yet copied."""

    tensor: torch.Tensor
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file that this rank writes. `boxes` name records by their position in `records`."""

    name: str
    home: Home
    records: tuple[PlannedRecord, ...]
    boxes: tuple[StoredBox, ...]
    tree: Any
    """The nested state of this file: `TensorRef`s for tensors, and private copies of the Python values."""


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What this rank writes, what it holds (`table`, with its `meshes` and `layouts`), and what it leaves to others.

    `alike` are the tensors of this rank that are taken to be the same as what another rank writes, in groups that all
    their holders have alike; `copied` names those that this rank writes for others. All holders sum them up, so that a
    difference is found and never lost.
    """

    files: tuple[FilePlan, ...]
    meshes: tuple[MeshEntry, ...]
    layouts: tuple[LayoutEntry, ...]
    table: Table
    values: Mapping[str, Any]
    alike: Mapping[str, tuple[tuple[str, torch.Tensor], ...]]
    copied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def plan_save(
    parts: Sequence[Part],
    coordinates: Coordinates,
    *,
    model_key: str = "model",
    replicated: Collection[str] = (),
) -> SavePlan:
    """Decide for every tensor and value of the state. `InvalidStateError` names a key that cannot be stored."""
    planner = _Planner(coordinates, model_key, frozenset(replicated))
    for part in parts:
        planner.add(part)
    return planner.finish(put_together(list(parts)))


@dataclass(slots=True)
class _Draft:
    """A file as it fills up."""

    records: list[PlannedRecord]
    boxes: list[StoredBox]
    known: dict[tuple[Any, ...], int]
    leaves: dict[Path, Any]


class _Planner:
    def __init__(self, coordinates: Coordinates, model_key: str, replicated: frozenset[str]) -> None:
        self._at = coordinates
        self._model_key = model_key
        self._replicated = replicated
        self._meshes: dict[MeshEntry, int] = {}
        self._layouts: dict[LayoutEntry, int] = {}
        self._tensors: dict[str, TensorEntry] = {}
        self._values: dict[str, Home] = {}
        self._value_of: dict[str, Any] = {}
        self._drafts: dict[Home, _Draft] = {}
        self._load: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        self._alike: dict[str, list[tuple[str, torch.Tensor]]] = {}
        self._copied: dict[str, list[str]] = {}

    def add(self, part: Part) -> None:
        def visit(path: Path, value: Any) -> None:
            name = join_path(path)
            if name in self._tensors or name in self._values:
                raise InvalidStateError(f"two entries of the state are both called {name!r}; rename one of them")
            if isinstance(value, torch.Tensor):
                self._add_tensor(part, path, name, value)
            else:
                self._add_value(part, path, name, value)

        try:
            map_leaves(part.tree, visit, part.path)
        except UnsafeValueError as error:
            raise InvalidStateError(f"{part.key}: {error}") from error

    def finish(self, tree: Any) -> SavePlan:
        files = tuple(self._finish_file(home, draft, tree) for home, draft in self._drafts.items() if draft.leaves)
        table = Table((self._at.rank,), self._tensors, self._values)
        alike = {name: tuple(tensors) for name, tensors in self._alike.items()}
        copied = {group: tuple(names) for group, names in self._copied.items()}
        return SavePlan(files, tuple(self._meshes), tuple(self._layouts), table, self._value_of, alike, copied)

    def _add_tensor(self, part: Part, path: Path, name: str, tensor: torch.Tensor) -> None:
        dtype = check_tensor(name, tensor)
        sharding = describe(name, tensor)
        alike = self._is_alike(part, sharding)
        home = self._home_of(path, alike)
        if sharding is None or (alike and home != "rank"):
            replica, mine = 0, home == "rank" or self._at.leads
        else:
            replica = self._choose_replica(sharding, math.prod(tensor.shape) * ITEMSIZE[dtype])
            mine = replica == sharding.replica
        layout = self._layout_of(home, sharding)
        self._tensors[name] = TensorEntry(dtype, tuple(tensor.shape), layout, replica)
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if mine:
            self._store(home, path, name, (tensor, local, dtype), sharding)
        self._note_copies(name, local, sharding, (home, replica), mine=mine)

    def _note_copies(
        self, name: str, local: torch.Tensor, sharding: Sharding | None, where: tuple[Home, int], *, mine: bool
    ) -> None:
        """Which copies are only taken to be alike, and so are compared: by the file that holds them, and the layout."""
        home, replica = where
        if sharding is None:
            if home == "rank" or self._at.dp_size == 1:
                return
            group = self._file_name(home)
        elif sharding.assumed and sharding.replicas > 1:
            writer = rank_file(sharding.writer(replica)) if home == "rank" else self._file_name(home)
            group = f"{writer} {sharding.mesh.dims} {sharding.placements}"
        else:
            return
        if mine:
            self._copied.setdefault(group, []).append(name)
        else:
            self._alike.setdefault(group, []).append((name, local.detach()))

    def _add_value(self, part: Part, path: Path, name: str, value: Any) -> None:
        try:
            check_value(value)
        except UnsafeValueError as error:
            raise InvalidStateError(f"{name}: {error}") from error
        declared = not self._replicated.isdisjoint((path[0], "*"))
        home: Home = "rank"
        if path[0] == self._model_key and (self._at.dp_size == 1 or declared):
            home = "model"
        elif declared:
            home = "replicated"
        self._values[name] = home
        value = _private(value)
        self._value_of[name] = value
        if home == "rank" or self._at.leads:
            self._draft(home).leaves[path] = value

    def _is_alike(self, part: Part, sharding: Sharding | None) -> bool:
        """Whether the ranks of this shard hold this tensor alike, by its placements or by what it belongs to."""
        if sharding is not None:
            return sharding.is_alike_on(self._at.dp_ranks)
        declared = not self._replicated.isdisjoint((part.path[0], "*"))
        return declared or self._at.dp_size == 1 or part.kind in ("module", "optimizer")

    def _home_of(self, path: Path, alike: bool) -> Home:
        if not alike:
            return "rank"
        if path[0] == self._model_key:
            return "model"
        declared = not self._replicated.isdisjoint((path[0], "*"))
        return "replicated" if declared or self._at.dp_size > 1 else "rank"

    def _choose_replica(self, sharding: Sharding, nbytes: int) -> int:
        """The least loaded replica: the same choice on every rank, since all see the same tensors in the same order."""
        load = self._load.setdefault((self._mesh_number(sharding), sharding.placements), [0] * sharding.replicas)
        chosen = load.index(min(load))
        load[chosen] += nbytes
        return chosen

    def _layout_of(self, home: Home, sharding: Sharding | None) -> int:
        if sharding is None:
            layout = LayoutEntry(home)
        else:
            layout = LayoutEntry(home, self._mesh_number(sharding), sharding.placements)
        return self._layouts.setdefault(layout, len(self._layouts))

    def _mesh_number(self, sharding: Sharding) -> int:
        return self._meshes.setdefault(sharding.mesh, len(self._meshes))

    def _store(
        self, home: Home, path: Path, name: str, what: tuple[torch.Tensor, torch.Tensor, str], sharding: Sharding | None
    ) -> None:
        whole, local, dtype = what
        draft, shape = self._draft(home), tuple(whole.shape)
        number = _record_number(draft, local, dtype)
        zeros = (0,) * len(shape)
        boxes = sharding.boxes(shape) if sharding is not None else (Box(zeros, shape, zeros),)
        if sum(math.prod(box.lengths) for box in boxes) != local.numel():
            raise InvalidStateError(
                f"{name} cannot be stored: its local tensor of shape {list(local.shape)} is not what its placements "
                "say this rank holds; make it with distribute_tensor, or with from_local and its true shape and stride"
            )
        draft.boxes += [StoredBox(name, number, shape, box) for box in boxes]
        draft.leaves[path] = TensorRef(number, local.dtype, tuple(local.shape))

    def _draft(self, home: Home) -> _Draft:
        return self._drafts.setdefault(home, _Draft([], [], {}, {}))

    def _file_name(self, home: Home) -> str:
        return home_file(home, self._at.rank, self._at.shard, self._at.shards)

    def _finish_file(self, home: Home, draft: _Draft, tree: Any) -> FilePlan:
        content = _prune(tree, draft.leaves)
        if home == "model":
            content["model_key"] = self._model_key
        return FilePlan(self._file_name(home), home, tuple(draft.records), tuple(draft.boxes), content)


def home_file(home: Home, rank: int, shard: int, shards: int) -> str:
    """The name of the file of that kind that belongs to a rank of that shard."""
    if home == "rank":
        return rank_file(rank)
    return model_file(shard, shards) if home == "model" else replicated_file(shard, shards)


def _record_number(draft: _Draft, local: torch.Tensor, dtype: str) -> int:
    """The record of this tensor: that of an earlier one with the very same memory (tied), else a new one."""
    nbytes = local.numel() * ITEMSIZE[dtype]
    memory = (
        local.device,
        local.data_ptr(),
        dtype,
        tuple(local.shape),
        local.stride(),
        local.is_conj(),
        local.is_neg(),
    )
    number = draft.known.get(memory) if nbytes else None
    if number is None:
        number = draft.known[memory] = len(draft.records)
        draft.records.append(PlannedRecord(local.detach(), dtype, tuple(local.shape), nbytes))
    return number


def _private(value: Any) -> Any:
    """The value, copied unless it can never change: training goes on before it is pickled."""
    return value if type(value) in (type(None), bool, int, float, str, bytes) else copy.deepcopy(value)


_GONE = object()


def _prune(tree: Any, leaves: Mapping[Path, Any]) -> Any:
    """The tree with the leaves that a file owns; dicts that become empty go, places in lists become None."""

    def walk(node: Any, path: Path) -> Any:
        if path in leaves:
            return leaves[path]
        if isinstance(node, dict) or hasattr(node, "keys"):
            kept = {key: walk(item, (*path, key)) for key, item in node.items()}
            return {key: item for key, item in kept.items() if item is not _GONE} or _GONE
        if type(node) in (list, tuple):
            items = [walk(item, (*path, i)) for i, item in enumerate(node)]
            if all(item is _GONE for item in items):
                return _GONE
            return type(node)(None if item is _GONE else item for item in items)
        return _GONE

    pruned = walk(tree, ())
    return {} if pruned is _GONE else pruned
