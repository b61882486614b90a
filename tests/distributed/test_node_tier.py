"""A disk of each node as a first tier, where every node holds the whole state (DDP, LoRA): a run of its own on each, by
the ranks of that node alone, beside the one that all share. Each is whole by itself; there is no half of anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import shardckpt as sc
from shardckpt.testing.pool import ProcessPool

NODES, RANKS_OF_NODE = 2, 2


def model_of(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Linear(8, 8)


def newest(local: sc.CheckpointManager, shared: sc.CheckpointManager) -> tuple[sc.CheckpointManager, int]:
    """The newest step that all nodes have on their disks, or that is in the shared root."""
    had: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(had, local.steps())
    everywhere = max(set.intersection(*map(set, had)), default=0)
    in_shared = shared.latest() or 0
    return (local, everywhere) if everywhere > in_shared else (shared, in_shared)


def train(rank: int, size: int, folder: Path, root: Path, upto: int, late: int) -> Any:
    """Saves each step on the node, each third one for all; the node `late` does not come to save its last step."""
    mesh = init_device_mesh("cpu", (NODES, RANKS_OF_NODE), mesh_dim_names=("node", "local"))
    node = mesh.get_local_rank("node")
    everybody, of_node = sc.Gangs.from_mesh(mesh), sc.Gangs.from_mesh(mesh["local"])
    model = DistributedDataParallel(model_of(upto))
    state = {"model": model.module, "progress": sc.TrainingProgress()}
    with (
        sc.CheckpointManager(root / f"disk_of_node_{node}", of_node, keep=sc.KeepLast(2)) as local,
        sc.CheckpointManager(root / "shared", everybody) as shared,
    ):
        place, first = newest(local, shared)
        if first:
            place.resume(state, first)
        for step in range(first + 1, upto + 1):
            with torch.no_grad():
                model.module.weight.fill_(step)
            if not (step == upto and node == late):
                local.save(step, state, replicated="*")
            if step % 3 == 0:
                shared.save(step, state, replicated="*")
        value = float(model.module.weight[0, 0])
    everybody.close()
    of_node.close()
    return ("local" if place is local else "shared"), first, value


def test_the_newest_that_all_nodes_have(ranks: ProcessPool, tmp_path: Path) -> None:
    for upto, late, expected in (
        (5, 1, ("shared", 0, 5.0)),  # a fresh start
        (4, -1, ("local", 4, 4.0)),  # one node has no step 5: both go on from 4
        (6, 0, ("local", 4, 6.0)),
    ):
        assert ranks.run(4, train, tmp_path, upto, late) == [expected] * 4
    for place in (tmp_path / "disk_of_node_0", tmp_path / "disk_of_node_1", tmp_path / "shared"):
        assert sc.verify(place).ok
