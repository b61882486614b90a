"""What a rank's part of the model is, said once for all ranks that say the same, and which of them writes what.

An inventory describes tensors by their placements on meshes, not by the boxes of each rank: it is as long as the model
has tensors, whatever the number of ranks. From it everybody can tell which rank writes which box.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from shardckpt.engine.consolidated.blocks import Block
from shardckpt.engine.sharding import mesh_coordinate, replica_number
from shardckpt.format.manifest import LayoutEntry, MeshEntry, Table, TensorEntry, decode_table, encode_table
from shardckpt.format.placement import shard_boxes

_NUMBER = re.compile(r"([0-9]+)")


def natural(name: str) -> tuple[Any, ...]:
    """Sorts names as people do: "layers.2" before "layers.10". The order of tensors in all files of this package."""
    parts = _NUMBER.split(name)  # texts and numbers by turns
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


@dataclass(frozen=True)
class Inventory:
    """The tensors of a rank's model state; those that lie in flat parameters of FSDP1 are not among them.

    A layout without a mesh is that of plain tensors: all ranks with this inventory hold them alike, and the first of
    them writes them.
    """

    meshes: tuple[MeshEntry, ...]
    layouts: tuple[LayoutEntry, ...]
    tensors: Mapping[str, TensorEntry]
    _known: dict[tuple[int, tuple[int, ...], int], list[tuple[int, tuple[Block, ...]]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def encode(self) -> dict[str, Any]:
        return {
            "meshes": [[list(m.dims), list(m.shape), list(m.ranks)] for m in self.meshes],
            "layouts": [[entry.home, entry.mesh, list(entry.placements)] for entry in self.layouts],
            "table": encode_table(Table((), self.tensors, {})),
        }

    @classmethod
    def decode(cls, content: Any) -> Inventory:
        meshes = [MeshEntry(tuple(dims), tuple(shape), tuple(ranks)) for dims, shape, ranks in content["meshes"]]
        layouts = [LayoutEntry(home, mesh, tuple(placements)) for home, mesh, placements in content["layouts"]]
        return cls(tuple(meshes), tuple(layouts), decode_table(content["table"]).tensors)

    @cached_property
    def digest(self) -> str:
        """Of equal inventories the same, on whatever rank."""
        return _digest(self.encode())

    @cached_property
    def _spreads(self) -> tuple[str, ...]:
        """For each layout a digest of its mesh and placements; a mesh itself takes as long to hash as it has ranks."""
        meshes = [[list(mesh.dims), list(mesh.shape), list(mesh.ranks)] for mesh in self.meshes]
        return tuple(
            _digest([None if at.mesh is None else meshes[at.mesh], list(at.placements)]) for at in self.layouts
        )

    def spread(self, name: str) -> str:
        """How a tensor lies on a mesh: the same text in all inventories where it lies so."""
        return self._spreads[self.tensors[name].layout]

    def is_plain(self, name: str) -> bool:
        return self.layouts[self.tensors[name].layout].mesh is None

    def writers(self, name: str) -> list[tuple[int, tuple[Block, ...]]]:
        """(rank, what it writes), of a tensor that is not plain."""
        entry = self.tensors[name]
        key = (entry.layout, entry.shape, entry.replica)
        if key not in self._known:
            layout = self.layouts[entry.layout]
            assert layout.mesh is not None
            mesh, placements = self.meshes[layout.mesh], layout.placements
            found = []
            for position, rank in enumerate(mesh.ranks):
                coordinate = mesh_coordinate(mesh, position)
                if replica_number(mesh.shape, placements, coordinate) == entry.replica:
                    boxes = shard_boxes(entry.shape, mesh.shape, placements, coordinate)
                    found.append((rank, tuple(Block(box.offsets, box.lengths) for box in boxes)))
            self._known[key] = found
        return self._known[key]


class Replicas:
    """Shares the writing of shards that several ranks hold: always the replica that has had the least to do so far.

    Used by every rank for itself, in the order of its model's state, so that all come to the same choice.
    """

    def __init__(self) -> None:
        self._load: dict[LayoutEntry, list[int]] = {}

    def choose(self, layout: LayoutEntry, replicas: int, entry_nbytes: int) -> int:
        load = self._load.setdefault(layout, [0] * replicas)
        chosen = load.index(min(load))
        load[chosen] += entry_nbytes
        return chosen


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
