"""What all ranks that saved held of a part, made by a function of the user's into what a rank of another job gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from shardckpt.engine.loading.fit import Fit
from shardckpt.engine.loading.sources import Sources
from shardckpt.errors import InvalidStateError
from shardckpt.format.manifest import TensorEntry
from shardckpt.format.tree import map_leaves
from shardckpt.state import Part, join_path


def check_mergeable(part: Part, saved: Sequence[str], sources: Sources) -> str:
    """Why a function cannot say what becomes of this part; empty if it can."""
    if part.kind not in ("stateful", "leaf") or isinstance(part.tree, torch.Tensor):
        return f"{part.key} is a {type(part.tree if part.kind == 'leaf' else part.owner).__name__}"
    sharded = next((name for name in saved if sources.is_sharded(name)), None)
    return f"{sharded} was saved in shards" if sharded else ""


def tensors_of_all(saved: Sequence[str], sources: Sources) -> Iterator[tuple[str, TensorEntry, int]]:
    """The tensors below a part that the data-parallel ranks held, each with its rank."""
    for rank in sources.siblings():
        held = sources.held_by(rank)
        for name in saved:
            entry = sources.tensor(name, rank) if name in held else None
            if entry is not None:
                yield name, entry, rank


Made = Mapping[tuple[str, int | None], torch.Tensor]
"""By name and rank."""


def merged(
    parts: Sequence[Part], fit: Fit, subtree: Callable[[Part, int], Any], place: tuple[int, int], made: Made
) -> dict[str, Any]:
    """What functions make of it for this rank, by part. On the caller's thread.

    `subtree` gives what a rank (of those that saved) had for a part; `place` is that of this rank (`Sources.place`).
    """

    def held(part: Part, rank: int) -> Any:
        return map_leaves(subtree(part, rank), lambda path, leaf: made.get((join_path(path), rank), leaf), part.path)

    found: dict[str, Any] = {}
    for part in (part for part in parts if part.key in fit.merges):
        try:
            found[part.key] = fit.merges[part.key]([held(part, rank) for rank in fit.trees[part.key]], *place)
        except Exception as error:
            reason = f"its function of new_world failed: {type(error).__name__}: {error}"
            raise InvalidStateError(f"{part.key}: {reason}") from error
    return found
