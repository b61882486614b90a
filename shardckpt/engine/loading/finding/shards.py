"""From boxes of a sharded tensor to the ranks that stored them: by arithmetic, whatever the number of ranks. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from shardckpt.format.manifest import OF_RANK, LayoutEntry, Manifest, TensorEntry
from shardckpt.format.placement import Box
from shardckpt.format.placing.holders import holders


class Shards:
    """Of one record, as a rank of the model shard `shard` looks for them."""

    def __init__(self, manifest: Manifest, shard: int) -> None:
        self._manifest = manifest
        self._shard = shard
        self._numbered: dict[int, tuple[int, ...]] = {}

    def of(self, entry: TensorEntry, parts: Iterable[Box], *, near: bool, most: int) -> list[tuple[int, Box]]:
        """The ranks and boxes that together make up these parts of the tensor; each box once.

        Of what several ranks have, each in a file that is the same for all ranks of its model shard, the first is
        taken, or with `near` one of this rank's own shard. `ValueError` if there are more boxes than `most`.
        """
        layout = self._manifest.layouts[entry.layout]
        assert layout.mesh is not None
        mesh = self._manifest.meshes[layout.mesh]
        strides = strides_of(mesh.shape)
        copies = self._copies(layout, entry.replica, near=near)
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, Box]] = {}
        for part in parts:
            extent = (part.offsets, part.lengths)
            for coordinate, box in holders(entry.shape, mesh.shape, layout.placements, extent, most=most):
                if (box.offsets, box.lengths) not in found:
                    place = sum(index * stride for index, stride in zip(coordinate, strides, strict=True))
                    found[box.offsets, box.lengths] = (self._nearest([mesh.ranks[place + at] for at in copies]), box)
        return list(found.values())

    def _copies(self, layout: LayoutEntry, replica: int, *, near: bool) -> list[int]:
        """Where, from the place of a shard on, the ranks lie that may be asked for it."""
        assert layout.mesh is not None
        shape = self._manifest.meshes[layout.mesh].shape
        strides = strides_of(shape)
        dims = [dim for dim, placement in enumerate(layout.placements) if placement == "R"]
        if layout.home in OF_RANK:  # the one that wrote it
            at = 0
            for dim in reversed(dims):
                replica, index = divmod(replica, shape[dim])
                at += index * strides[dim]
            return [at]
        if not near:
            return [0]
        dims = [dim for dim in dims if dim in self._numbered_by(layout.mesh)]
        steps = ([index * strides[dim] for index in range(shape[dim])] for dim in dims)
        return [sum(step) for step in itertools.product(*steps)]

    def _nearest(self, ranks: Sequence[int]) -> int:
        shard_of = self._manifest.shard_of
        return next((rank for rank in ranks if shard_of[rank] == self._shard), ranks[0])

    def _numbered_by(self, mesh: int) -> tuple[int, ...]:
        """The dimensions of a mesh along which ranks are of different model shards. One look at all ranks, once."""
        if mesh not in self._numbered:
            entry, shard_of = self._manifest.meshes[mesh], self._manifest.shard_of
            shards = [shard_of[rank] for rank in entry.ranks]
            self._numbered[mesh] = tuple(
                dim
                for dim, (size, stride) in enumerate(zip(entry.shape, strides_of(entry.shape), strict=True))
                if not _is_constant(shards, size, stride)
            )
        return self._numbered[mesh]


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """How far apart, in row-major order, neighbours along each dimension are."""
    return tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1] if shape else ()


def _is_constant(numbers: list[int], size: int, stride: int) -> bool:
    block = size * stride
    return all(
        numbers[at : at + block - stride] == numbers[at + stride : at + block] for at in range(0, len(numbers), block)
    )
