"""In which file of a checkpoint a rank's part of each home lies. No torch."""

from __future__ import annotations

from shardckpt.format.layout import frozen_file, frozen_rank_file, model_file, rank_file, replicated_file
from shardckpt.format.manifest import OF_RANK, Home


def home_file(home: Home, rank: int, shard: int, shards: int) -> str:
    """The name of the file of that kind that belongs to a rank of that shard."""
    if home in OF_RANK:
        return rank_file(rank) if home == "rank" else frozen_rank_file(rank)
    if home == "frozen":
        return frozen_file(shard, shards)
    return model_file(shard, shards) if home == "model" else replicated_file(shard, shards)
