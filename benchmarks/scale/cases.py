"""One job: what its save and its loads cost, measured, and what that makes on real networks, projected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.scale import world as far
from benchmarks.scale.jobs import Mesh, Model
from benchmarks.scale.loading import LoadCost, plan_load
from benchmarks.scale.peers import DcpCost, plan_with_dcp
from benchmarks.scale.saving import Committed, Planned, commit, plan_rank
from benchmarks.scale.world import Projection, World

_BYTES_OF_PARAMETER = 10
"""bfloat16, and two moments in float32."""


@dataclass(slots=True)
class Case:
    """A job, and all that is known of it."""

    name: str
    mesh: Mesh
    model: Model
    tensors: int
    """Sharded ones of one rank, without the optimizer's step counts."""
    rank_s: dict[str, float]
    """Of a rank in the middle of the job."""
    rank_objects: int
    rank0_s: dict[str, float]
    rank0_collected_s: float
    """All of that with Python's collector on."""
    receipts_nbytes: int
    record_nbytes: int
    told_nbytes: int
    """Of the record, packed, as it is told to all."""
    index_nbytes: int
    """Most of any rank that was planned for real: all files that it completes."""
    tree_nbytes: int
    loads: dict[str, LoadCost] = field(default_factory=dict)
    """By the mesh that loads; the same one first."""
    dcp: DcpCost | None = None
    projections: dict[str, Projection] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of the whole state."""
        return self.model.parameters * _BYTES_OF_PARAMETER

    def encode(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"ranks": self.mesh.ranks, "parameters": self.model.parameters, "nbytes": self.nbytes}


def measure(
    name: str, mesh: Mesh, model: Model, *, others: Sequence[Mesh] = (), peers: bool = False, world: World | None = None
) -> Case:
    """Run it all."""
    middle = mesh.ranks // 2
    own = plan_rank(mesh, model, middle)
    saved = commit(mesh, model, planned={middle: own}, real=(middle,))
    collected = commit(mesh, model, planned=saved.planned, real=(middle,), collected=True)
    case = _case(name, saved, own, sum(collected.seconds.values()))
    for on in (mesh, *others):
        case.loads[on.label] = plan_load(saved, on=on, rank=on.ranks // 2)
    if peers:
        case.dcp = plan_with_dcp(mesh, model)
    if world is not None:
        case.projections = {
            "save": project_save(case, world),
            "save in parts of 64 MiB": project_save(case, far.with_larger_parts(world)),
            "load": project_load(case, world),
        }
    return case


def _case(name: str, saved: Committed, own: Planned, collected_s: float) -> Case:
    tensors = sum(bool(entry.shape) for entry in own.plan.table.tensors.values())
    most = max(saved.planned.values(), key=lambda one: one.index_nbytes)
    sizes = saved.received_nbytes, len(saved.record), saved.told_nbytes, most.index_nbytes, most.tree_nbytes
    job = saved.mesh, saved.model, tensors
    return Case(name, *job, own.seconds, own.objects, saved.seconds, collected_s, *sizes)


def project_save(case: Case, world: World) -> Projection:
    """An unchanged state, saved in the background: from the call to the commit."""
    mesh, each = case.mesh, case.nbytes // case.mesh.ranks
    requests = far.requests_of_put(world, each)
    puts: dict[str, Any] = {"latency": world.put_latency, "per_prefix": world.prefix_puts}
    parts = {
        "plan": case.rank_s["take apart, again"] + case.rank_s["plan, again"],
        "copy and sum": each / world.device_rate + each / world.sum_rate,
        "meet, attempt": far.gathering(world, mesh.ranks, 100 * mesh.ranks) + far.telling(world, mesh.ranks, 100),
        "write": far.moving(world, mesh, case.nbytes, requests=requests, **puts),
        "receipts": far.gathering(world, mesh.ranks, case.receipts_nbytes),
        "compose": sum(case.rank0_s.values()),
        "record": world.put_latency + case.record_nbytes / world.connection_rate,
        "tell": far.telling(world, mesh.ranks, 200),
    }
    return Projection(parts, far.bytes_bound(world, mesh, case.nbytes), requests * mesh.ranks + 1)


def project_load(case: Case, world: World) -> Projection:
    """On the same mesh, each byte read by one rank, checked before the state changes."""
    mesh, each, cost = case.mesh, case.nbytes // case.mesh.ranks, next(iter(case.loads.values()))
    reads = max(far.requests_of_get(each), case.tensors // 64)
    gets: dict[str, Any] = {"latency": world.get_latency, "per_prefix": world.prefix_gets}
    about = math.ceil(cost.requests / world.connections) * world.get_latency
    throttled = cost.requests * mesh.ranks / (world.prefix_gets * world.prefixes)
    parts = {
        "find the step": 2 * world.get_latency,
        "read the record": world.get_latency + case.record_nbytes / world.connection_rate,
        "tell the record": far.telling(world, mesh.ranks, case.told_nbytes),
        "plan": cost.total_s,
        "indexes": max(about + cost.other_nbytes / world.connection_rate, throttled),
        "agree": 2 * far.gathering(world, mesh.ranks, 200 * mesh.ranks) + 2 * far.telling(world, mesh.ranks, 200),
        "read": far.moving(world, mesh, case.nbytes, requests=reads, **gets),
        "sum and copy": each / world.sum_rate + each / world.device_rate,
    }
    return Projection(parts, far.bytes_bound(world, mesh, case.nbytes), (reads + cost.requests) * mesh.ranks + 3)


def meshes(ranks: int, *, experts: bool = False, pp: int = 1) -> tuple[Mesh, list[Mesh]]:
    """A mesh of so many ranks, and others that load what it has saved: half as many ranks, and another split."""
    tp = min(8, ranks)
    dp = max(1, ranks // tp // pp)
    ep = min(64, dp * tp) if experts else 1
    own = Mesh(dp, tp, pp, ep)
    return own, list(dict.fromkeys(_others(own)))


def _others(own: Mesh) -> Iterator[Mesh]:
    if own.dp > 1:
        yield Mesh(own.dp // 2, own.tp, own.pp, min(own.ep, own.dp // 2 * own.tp))
    if own.tp > 1 and own.ep == 1:
        yield Mesh(own.dp, own.tp // 2, own.pp)
