"""How the engine describes a DTensor: over the root mesh, from where this rank stands now."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import ShardOrderEntry
from torch.distributed.tensor.placement_types import Placement

from shardckpt import InvalidStateError
from shardckpt.engine.sharding import Sharding, describe
from shardckpt.format.manifest import MeshEntry

NAMES = ("pp", "dp", "tp")


def described(
    rank: int, world_size: int, folder: Path, cases: list[tuple[tuple[str, ...], list[Placement]]]
) -> list[Sharding | None]:
    """Of a tensor on each of these parts of a mesh with three dimensions."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=NAMES)
    parts = [mesh[names] if names != NAMES else mesh for names, _ in cases]
    local = torch.ones(2, 2)
    return [
        describe("w", DTensor.from_local(local, part, placements, run_check=False))
        for part, (_, placements) in zip(parts, cases, strict=True)
    ]


def test_copies_are_along_every_dimension_but_that_of_the_stages(ranks):
    cases: list[Any] = [
        (("tp",), [Shard(1)]),
        (("dp",), [Shard(0)]),
        (("dp", "tp"), [Shard(0), Replicate()]),
        (NAMES, [Replicate(), Shard(0), Shard(0)]),
    ]
    for rank, found in enumerate(ranks.run(4, described, cases)):
        stage, tp = divmod(rank, 2)
        here = MeshEntry(("dp", "tp"), (1, 2), (2 * stage, 2 * stage + 1))
        assert found == [
            Sharding(here, ("R", "S(1)"), (0, tp), given=("tp",)),
            Sharding(here, ("S(0)", "R"), (0, tp), assumed=True, given=("dp",)),  # it does not know of "tp" itself
            Sharding(here, ("S(0)", "R"), (0, tp)),
            Sharding(MeshEntry(NAMES, (2, 1, 2), (0, 1, 2, 3)), ("R", "S(0)", "S(0)"), (stage, 0, tp)),
        ]


def describe_twice(rank: int, world_size: int, folder: Path) -> list[Sharding | None]:
    """In one process that is another rank the second time, as after a restart that keeps the processes."""
    found = []
    for attempt, mine in enumerate((rank, world_size - 1 - rank)):
        store = dist.FileStore(str(folder / f"store_{attempt}"), world_size)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=mine, world_size=world_size, timeout=timedelta(seconds=30))
        mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
        found.append(describe("w", DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)))
        dist.destroy_process_group()
    return found


def test_a_process_may_become_another_rank(ranks):
    for rank, found in enumerate(ranks.run(2, describe_twice, backend=None)):
        assert [sharding.coordinate for sharding in found] == [(rank,), (1 - rank,)]


def describe_a_sum(rank: int, world_size: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    with pytest.raises(InvalidStateError, match=r"w has placement .* redistribute it first"):
        describe("w", DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False))
    assert describe("w", torch.ones(2)) is None


def test_a_sum_that_is_still_to_be_done_is_refused(ranks):
    ranks.run(2, describe_a_sum)


def describe_another_order(rank: int, world_size: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensor = DTensor.from_local(torch.ones(2), mesh, [Shard(0), Shard(0)], run_check=False)
    assert describe("w", tensor) is not None
    vars(tensor._spec)["shard_order"] = (ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),)
    with pytest.raises(InvalidStateError, match=r"w was cut by the mesh's dimensions \(1, 0\) in this order"):
        describe("w", tensor)


def test_shards_in_an_order_that_placements_do_not_tell_are_refused(ranks):
    """They would be stored as other rows than they are."""
    ranks.run(4, describe_another_order)
