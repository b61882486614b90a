"""What of which files a rank needs, from the record and what it wants. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from shardckpt.engine.loading.contents import Contents
from shardckpt.engine.loading.fetching.fetch import Need, overlaps
from shardckpt.engine.loading.fit import Fit
from shardckpt.engine.loading.integrity import Region
from shardckpt.engine.loading.sources import Sources
from shardckpt.format.index import StoredBox
from shardckpt.format.placement import Box

Wanted: TypeAlias = tuple[int, str, Box, Region, tuple[int, ...]]
"""Number of a tensor, a file, the box that it holds, what is needed of the box, and where that goes in the tensor."""


def needs_of(fit: Fit, sources: Sources) -> list[Wanted]:
    """The regions that fill the tensors of a rank."""
    needs = []
    for position, wanted in enumerate(fit.tensors):
        chunks = sources.chunks(wanted.name, wanted.rule, whole=wanted.is_whole, parts=wanted.boxes)
        for (file, box), region, target in overlaps(wanted, chunks):
            needs.append((position, file, box, region, target))
    return needs


def tree_ranks_of(fit: Fit, sources: Sources) -> set[int]:
    """The ranks (of those that saved) whose Python values this rank takes."""
    ranks = {rank for those in fit.trees.values() for rank in those} | set(fit.extra.values())
    for value in fit.values:
        rank = sources.part_rank([value.key], value.rule)
        if rank is not None:
            ranks.add(rank)
    return ranks


def loaded_values(fit: Fit, sources: Sources, contents: Contents) -> Mapping[str, Any]:
    """The Python values that a rank takes one by one, by key."""
    values: dict[str, Any] = {}
    for value in fit.values:
        rank = sources.part_rank([value.key], value.rule)
        if rank is not None:
            values[value.key] = contents.leaves(sources.trees_of(rank))[fit.selection.saved_name(value.key)][1]
    return values


def region_in(stored: StoredBox, box: Box, region: Region) -> Region:
    """The region of a box of the record, in the file's own record of it, which may hold several boxes. The record does
    not say where in it a piece begins; the file's index does."""
    if stored.box.local == box.local:
        return region
    start = (at + inside - told for at, inside, told in zip(region.start, stored.box.local, box.local, strict=True))
    return Region(tuple(start), region.lengths)


def place_of(target: torch.Tensor, need: Need) -> torch.Tensor:
    """The part of the local tensor that a region goes to."""
    if need.region.lengths == tuple(target.shape):
        return target
    return target[tuple(slice(at, at + n) for at, n in zip(need.target, need.region.lengths, strict=True))]
