"""What a rank holds of the model, which of it it writes, and what it tells rank 0 of it. Made by each rank alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardckpt.engine.consolidated.blocks import Shape
from shardckpt.engine.consolidated.flat import FlatTensor, flat_state, has_flat_parameters
from shardckpt.engine.consolidated.fragments import Fragment, sum_of
from shardckpt.engine.consolidated.inventory import Inventory, Replicas, natural
from shardckpt.engine.sharding import Sharding, check_tensor, describe
from shardckpt.errors import InvalidStateError
from shardckpt.format.checksum import to_hex, value_digest
from shardckpt.format.index import ITEMSIZE
from shardckpt.format.manifest import LayoutEntry, MeshEntry, TensorEntry
from shardckpt.format.tree import TensorRef, UnsafeValueError, check_value, encode_tree, map_leaves
from shardckpt.state import Path, StateReader, join_path
from shardckpt.storage.transfer.several import for_each

_PLAIN = "plain"
"""The group of the tensors that all ranks of an inventory hold alike."""


@dataclass(frozen=True, slots=True)
class FlatPiece:
    """What a rank tells of one box of a tensor that lies in a flat parameter."""

    name: str
    dtype: str
    shape: Shape
    holders: str
    offsets: Shape
    lengths: Shape

    def encode(self) -> list[Any]:
        return [self.name, self.dtype, list(self.shape), self.holders, list(self.offsets), list(self.lengths)]

    @classmethod
    def decode(cls, content: Any) -> FlatPiece:
        name, dtype, shape, holders, offsets, lengths = content
        return cls(name, dtype, tuple(shape), holders, tuple(offsets), tuple(lengths))


@dataclass(frozen=True, slots=True)
class Holding:
    """What one rank has of the model, as views of live memory."""

    inventory: Inventory
    fragments: tuple[Fragment, ...]
    """What this rank writes, in the order of its file; the plain ones only if it is the first to hold them."""
    sums: Mapping[tuple[str, Shape], int]
    """By name and offsets (see `fragments.sum_of`)."""
    flat: tuple[FlatPiece, ...]
    alike: Mapping[str, Mapping[str, str]]
    """By group of ranks that are taken to hold the same: name to a digest of what this rank holds."""
    values: Mapping[str, str]
    """Digests of the Python values in the state (extra state of modules)."""
    notes: bytes
    """The pickle of the nested state, without the tensors' bytes, and of the ties."""

    def written(self, *, plain: bool) -> list[Fragment]:
        """What this rank writes; with the plain tensors, or without."""
        names = self.inventory.tensors
        return [f for f in self.fragments if plain or f.name not in names or not self.inventory.is_plain(f.name)]

    def announcement(self) -> dict[str, Any]:
        """What rank 0 hears of it first; JSON."""
        groups = {group: value_digest(sorted(held.items())) for group, held in self.alike.items()}
        flat = [piece.encode() for piece in self.flat]
        return {"inventory": self.inventory.digest, "flat": flat, "alike": groups, "values": dict(self.values)}


def holding_of(model: nn.Module, model_key: str) -> Holding:
    """What this rank holds. On the training's thread; nothing is communicated, nothing is copied.

    `InvalidStateError` names an entry that cannot be stored.
    """
    if has_flat_parameters(model):
        state, ties = flat_state(model)
    else:
        (part,) = StateReader().take_apart({model_key: model})
        state, ties = part.tree, _ties(part.tree, model.state_dict(keep_vars=True).values())
    taker = _Taker(model_key, ties)
    try:
        tree = map_leaves(state, taker.visit, (model_key,))
    except UnsafeValueError as error:
        raise InvalidStateError(f"{model_key}: {error}") from error
    return taker.holding(tree if state else {})


def _ties(names: Iterable[str], parameters: Iterable[Any]) -> dict[str, str]:
    """The names of entries that are the very same tensor as an earlier one, with the name of that."""
    first: dict[int, str] = {}
    pairs = [(name, p) for name, p in zip(names, parameters, strict=True) if isinstance(p, torch.Tensor)]
    return {name: first[id(p)] for name, p in pairs if first.setdefault(id(p), name) != name}


class _Taker:
    """Goes through the state, leaf by leaf."""

    def __init__(self, model_key: str, ties: Mapping[str, str]) -> None:
        self._key = model_key
        self._ties = ties
        self._meshes: dict[MeshEntry, int] = {}
        self._layouts: dict[LayoutEntry, int] = {}
        self._tensors: dict[str, TensorEntry] = {}
        self._replicas = Replicas()
        self._mine: list[Fragment] = []
        self._compared: dict[str, list[Fragment]] = {}
        self._flat: list[FlatPiece] = []
        self._values: dict[str, Any] = {}

    def visit(self, path: Path, leaf: Any) -> Any:
        """What stands for the leaf in the notes: a `TensorRef` (the number means nothing yet), or the value itself."""
        name = join_path(path)
        if name in self._tensors or name in self._values:
            raise InvalidStateError(f"two entries of the model's state are both called {name!r}; rename one of them")
        if isinstance(leaf, FlatTensor):
            if path[1] not in self._ties:
                self._add_flat(name, leaf)
            return TensorRef(0, leaf.dtype, leaf.shape)
        if isinstance(leaf, torch.Tensor):
            if path[1] not in self._ties:
                self._add(name, leaf)
            return TensorRef(0, leaf.dtype, tuple(leaf.shape))
        try:
            check_value(leaf)
        except UnsafeValueError as error:
            raise InvalidStateError(f"{name}: {error}") from error
        self._values[name] = leaf
        return leaf

    def holding(self, tree: Any) -> Holding:
        fragments = sorted(self._mine, key=lambda fragment: natural(fragment.name))  # stable: blocks keep their order
        compared = [f for group in self._compared.values() for f in group]
        sums: dict[tuple[str, Shape], int] = {}

        def sum_up(fragment: Fragment) -> None:
            sums[fragment.name, fragment.offsets] = sum_of(fragment)

        every = {(f.name, f.offsets): f for f in (*fragments, *compared)}
        for_each(every.values(), sum_up, threads=2)
        alike = {group: _digests(held, sums) for group, held in self._compared.items()}
        ties = {f"{self._key}.{name}": f"{self._key}.{first}" for name, first in self._ties.items()}
        notes = encode_tree({"state": tree, "ties": ties})
        values = {name: value_digest(value) for name, value in self._values.items()}
        inventory = Inventory(tuple(self._meshes), tuple(self._layouts), self._tensors)
        return Holding(inventory, tuple(fragments), sums, tuple(self._flat), alike, values, notes)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        dtype, shape = check_tensor(name, tensor), tuple(tensor.shape)
        sharding = describe(name, tensor)
        if sharding is None:
            self._tensors[name] = TensorEntry(dtype, shape, self._layout(LayoutEntry("model")))
            fragments = [Fragment(name, dtype, shape, (0,) * len(shape), tensor.detach())] if tensor.numel() else []
            self._mine += fragments
            self._compared.setdefault(_PLAIN, []).extend(fragments)
            return
        mesh = self._meshes.setdefault(sharding.mesh, len(self._meshes))
        layout = LayoutEntry("rank", mesh, sharding.placements)
        replica = self._replicas.choose(layout, sharding.replicas, math.prod(shape) * ITEMSIZE[dtype])
        number = self._layout(layout)
        self._tensors[name] = TensorEntry(dtype, shape, number, replica)
        fragments = _local_fragments(name, dtype, tensor, sharding)
        if replica == sharding.replica:
            self._mine += fragments
        if sharding.assumed and sharding.replicas > 1:
            at = [i for i, placement in zip(sharding.coordinate, sharding.placements, strict=True) if placement != "R"]
            self._compared.setdefault(f"{number} {at}", []).extend(fragments)

    def _add_flat(self, name: str, flat: FlatTensor) -> None:
        dtype = str(flat.dtype).removeprefix("torch.")
        if not math.prod(flat.shape):
            self._tensors[name] = TensorEntry(dtype, flat.shape, self._layout(LayoutEntry("model")))
            return
        fragments = [Fragment(name, dtype, flat.shape, offsets, piece) for offsets, piece in flat.pieces]
        if flat.mine:
            self._mine += fragments
            self._flat += [
                FlatPiece(name, dtype, flat.shape, flat.holders, f.offsets, tuple(f.tensor.shape)) for f in fragments
            ]
        if flat.assumed:
            self._compared.setdefault(flat.holders, []).extend(fragments)

    def _layout(self, layout: LayoutEntry) -> int:
        return self._layouts.setdefault(layout, len(self._layouts))


def _local_fragments(name: str, dtype: str, tensor: torch.Tensor, sharding: Sharding) -> list[Fragment]:
    local, shape = getattr(tensor, "_local_tensor", tensor).detach(), tuple(tensor.shape)
    boxes = sharding.boxes(shape)
    if sum(math.prod(box.lengths) for box in boxes) != local.numel():
        raise InvalidStateError(
            f"{name} cannot be stored: its local tensor of shape {list(local.shape)} is not what its placements say "
            "this rank holds; make it with distribute_tensor, or with from_local and its true shape and stride"
        )
    found = []
    for box in boxes:
        at = tuple(slice(start, start + n) for start, n in zip(box.local, box.lengths, strict=True))
        found.append(Fragment(name, dtype, shape, box.offsets, local[at]))
    return found


def _digests(held: Sequence[Fragment], sums: Mapping[tuple[str, Shape], int]) -> dict[str, str]:
    found: dict[str, int] = {}
    for fragment in held:
        found[fragment.name] = found.get(fragment.name, 0) ^ sums[fragment.name, fragment.offsets]
    return {name: to_hex(total) for name, total in found.items()}
