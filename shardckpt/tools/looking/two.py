"""Two committed steps, held against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from shardckpt.engine.loading.selecting.names import Patterns
from shardckpt.tools.looking.diff import BUDGET, Difference, compare, unheard
from shardckpt.tools.moving.step import StepSource
from shardckpt.tools.moving.writing.told import Told
from shardckpt.tools.place import Where


@dataclass(frozen=True, slots=True)
class StepsDiff:
    """How two steps differ."""

    first: str
    """URL of the step, without credentials."""
    second: str
    difference: Difference
    own: tuple[str, ...]
    """Tensors of which each rank (or shard) of one of the steps had its own; those of `rank` were compared."""
    rank: int


def diff(
    first: Where,
    second: Where,
    *,
    only: Sequence[str] = (),
    rank: int = 0,
    budget: int = BUDGET,
    told: Told | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> StepsDiff:
    """Hold a step against another, on whatever ranks each was saved: two steps of a run, or the newest of two runs.

    `CheckpointNotFoundError` if one is not there, `CheckpointDamagedError` if bytes are not those that were written,
    `ValueError` if one was saved by no such rank; nothing is changed.

    Args:
        first: a run, of which the newest step is meant, or a step (`.../step_100`); a path, URL or `Storage`.
        second: the same.
        only: patterns for names of tensors and values, as in `LoadPolicy(include=...)`.
        rank: whose Python values and own tensors are compared.
        budget: bytes in memory at once, about; the indexes of both steps come on top.
        told: hears of progress: the number of the second step, the bytes that have just been read of both, and all
            that will be.
        storage_options: for fsspec; never logged.
    """

    def opened(where: Where) -> StepSource:
        return StepSource.open(where, rank=rank, budget_nbytes=budget // 4, storage_options=storage_options)

    with closing(opened(first)) as one, closing(opened(second)) as other:
        patterns = Patterns(only)
        both = dict.fromkeys((*one.differ, *other.differ))
        own = tuple(name for name in both if not only or patterns.matching(name))
        heard = unheard if told is None else partial(told, other.manifest.step)
        difference = compare(one, other, only=only, budget=budget // 2, told=heard)
        return StepsDiff(one.url, other.url, difference, own, rank)
