"""Where a rank stands in the job, as plans and records need it."""

from __future__ import annotations

from dataclasses import dataclass

from shardckpt.gang.gangs import Gangs


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where this rank stands: ranks are global; a shard is a model-parallel rank (pipeline x tensor)."""

    rank: int
    world_size: int
    shard: int
    shards: int
    dp_ranks: tuple[int, ...]
    """The global ranks that hold the same shard as this one, in order; their first writes what they hold alike."""
    stage: tuple[tuple[int, ...], ...] = ()
    """For each tensor-parallel rank of this rank's pipeline stage its `dp_ranks`."""

    @property
    def dp_size(self) -> int:
        return len(self.dp_ranks)

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of those that hold its shard."""
        return self.rank == self.dp_ranks[0]

    @classmethod
    def of(cls, gangs: Gangs) -> Coordinates:
        """Where this rank stands in these gangs."""
        shard = gangs.pp.rank * gangs.tp.size + gangs.tp.rank
        shards = gangs.pp.size * gangs.tp.size
        return cls(gangs.root.rank, gangs.root.size, shard, shards, gangs.dp_ranks, gangs.stage)
