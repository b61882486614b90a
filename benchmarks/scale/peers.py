"""The same job planned by `torch.distributed.checkpoint`: its own default planners, on the same ranks and states."""

from __future__ import annotations

import gc
import pickle
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from benchmarks.scale.jobs import Mesh, Model, Rank
from benchmarks.scale.saving import timed
from shardckpt.state import StateReader, put_together


@dataclass(frozen=True, slots=True)
class DcpCost:
    """What DCP does for one save and one load, in seconds of processor time and bytes."""

    plan_s: float
    """Median rank's own plan."""
    sent_nbytes: int
    """Pickled plans of all ranks, on their way to rank 0."""
    rank0_s: float
    """Unpickle them all, and plan for all."""
    told_nbytes: int
    """Pickled final plans, on their way back."""
    metadata_nbytes: int
    """Of `.metadata`, which every rank reads when it loads."""
    read_s: float
    """Unpickle it."""
    load_s: float
    """Median of a few ranks' plans of a load on the same mesh."""


def plan_with_dcp(mesh: Mesh, model: Model, *, loading: int = 1) -> DcpCost:
    """All ranks plan for real. The collector is on, as it is in `dcp.save`."""
    sent, seconds = [], []
    for rank in range(mesh.ranks):
        planner = DefaultSavePlanner()
        planner.set_up_planner(_state(mesh, model, rank), is_coordinator=rank == 0)
        plan, took = timed(planner.create_local_plan)
        seconds.append(took)
        sent.append(pickle.dumps(plan))
    coordinator: Any = DefaultSavePlanner()
    coordinator.set_up_planner(_state(mesh, model, 0), is_coordinator=True)
    coordinator.create_local_plan()
    gc.collect()

    def plan_for_all() -> Any:
        return coordinator.create_global_plan([pickle.loads(plan) for plan in sent])

    (final, metadata), rank0_s = timed(plan_for_all)
    told = sum(len(pickle.dumps(plan)) for plan in final)
    stored = pickle.dumps(metadata)
    del final, metadata
    gc.collect()
    metadata, read_s = timed(lambda: pickle.loads(stored))
    loads = []
    for rank in range(0, mesh.ranks, max(1, mesh.ranks // loading))[:loading]:
        loader = DefaultLoadPlanner()
        state = {
            name: value
            for name, value in _state(mesh, model, rank).items()
            if not isinstance(metadata.state_dict_metadata.get(name), BytesStorageMetadata)
        }
        loader.set_up_planner(state, metadata, is_coordinator=rank == 0)
        _, took = timed(loader.create_local_plan)
        loads.append(took)
    rate = sorted(seconds)[len(seconds) // 2], sorted(loads)[len(loads) // 2]
    return DcpCost(rate[0], sum(map(len, sent)), rank0_s, told, len(stored), read_s, rate[1])


def _state(mesh: Mesh, model: Model, rank: int) -> dict[str, Any]:
    """As nested dicts of tensors and values: what users give to `dcp.save`."""
    return put_together(StateReader().take_apart(Rank(mesh, model, rank).state()))
