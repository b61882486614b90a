"""The gangs of a job: all of its ranks, and those along each dimension of its mesh."""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from shardckpt.gang.base import Gang
from shardckpt.gang.local import LocalGang
from shardckpt.gang.store import StoreGang
from shardckpt.gang.wire.mailbox import Store
from shardckpt.gang.wire.nonce import agree_on_nonce, roll_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_START = timedelta(minutes=5)
"""How long the ranks of a job may come after each other at the start."""
_MOST_LINKS = 256
"""Of a gang over gloo: its rank 0 has one to each other rank. Larger gangs talk through the store, as a tree."""


@dataclass(frozen=True)
class Gangs:
    """Who acts together in this job, as this rank sees it.

    Made once, at the start, by all ranks on their main thread: `local`, `from_env` or `from_mesh`. Only there do the
    ranks wait for each other; connections are made when a gang is first entered. One set is used by one thread at a
    time; `fork` gives another set for another thread.
    """

    root: Gang
    """All ranks."""
    dp: Gang
    """The data-parallel ranks: those that hold the same part of the model, or shards of it."""
    tp: Gang
    """The tensor-parallel ranks of one replica and stage."""
    pp: Gang
    """The pipeline stages of one replica."""
    dp_ranks: tuple[int, ...] = (0,)
    """The ranks of `dp` in the numbering of `root`."""
    stage: tuple[tuple[int, ...], ...] = ((0,),)
    """For each tensor-parallel rank of this rank's pipeline stage the ranks of its `dp`, in that numbering."""

    @classmethod
    def local(cls) -> Gangs:
        """One process by itself."""
        return cls(LocalGang("root"), LocalGang("dp"), LocalGang("tp"), LocalGang("pp"))

    @classmethod
    def from_env(cls, tp: int = 1, pp: int = 1, *, timeout: timedelta = _START) -> Gangs:
        """The gangs of the job that this process was started in; called by all ranks of it.

        Ranks are numbered (dp, pp, tp) with tp fastest: `tp_rank = rank % tp`. With `torch.distributed` initialised,
        the gangs are gloo groups of their own (`ProcessGroupGang`); those of more than 256 ranks talk through its store
        (`StoreGang`). Without it, but under torchrun or a launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and
        MASTER_PORT, all talk through a TCPStore there: torchrun's own, or one in rank 0's process, which must then be
        the last to end; a later `init_process_group` is not disturbed. With neither it is one process. `GangError` if
        ranks do not come within `timeout`.
        """
        job = _initialised() or _launched(os.environ, timeout)
        size = 1 if job is None else job.size
        if size % (tp * pp):
            raise ValueError(f"tp={tp} x pp={pp} does not divide the {size} ranks of this job")
        if job is None or job.size == 1:
            return cls.local()
        return cls.of(job.gang(range(job.size), timeout), tp=tp, pp=pp)

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, *, timeout: timedelta = _START) -> Gangs:
        """The gangs along a mesh; called by all ranks of the mesh.

        Its dimensions "tp" and "pp" are those; all others together (replicate, shard, cp, ...) are dp, in row-major
        order. A rank of `root` is the global rank where the mesh covers the job; else its place among the mesh's ranks.
        """
        job = _initialised()
        if job is None:
            raise ValueError("a DeviceMesh needs torch.distributed: call init_process_group first")
        members = sorted(mesh.mesh.flatten().tolist())
        if job.rank not in members:
            raise ValueError(f"rank {job.rank} is not in this mesh of ranks {members}")
        if len(members) == 1:
            return cls.local()
        names = mesh.mesh_dim_names or ()
        grid = mesh.mesh.tolist()
        groups = mesh_groups(grid, tuple(names), job.rank)
        stage = [mesh_groups(grid, tuple(names), rank)["dp"] for rank in groups["tp"]]
        numbered = {name: [members.index(rank) for rank in ranks] for name, ranks in groups.items()}
        numbers = [[members.index(rank) for rank in ranks] for ranks in stage]
        return cls._with(job.gang(members, timeout), numbered, numbers)

    @classmethod
    def of(cls, root: Gang, *, tp: int = 1, pp: int = 1) -> Gangs:
        """The gangs over a given root, its ranks numbered (dp, pp, tp) with tp fastest; called by all its ranks."""
        block, rank = tp * pp, root.rank
        if root.size % block:
            raise ValueError(f"tp={tp} x pp={pp} does not divide the {root.size} ranks of gang {root.name!r}")
        first = rank - rank % block
        groups = {
            "dp": list(range(rank % block, root.size, block)),
            "tp": [rank - rank % tp + i for i in range(tp)],
            "pp": [first + rank % tp + i * tp for i in range(pp)],
        }
        stage = [range(rank % block - rank % tp + i, root.size, block) for i in range(tp)]
        return cls._with(root, groups, stage)

    @classmethod
    def _with(cls, root: Gang, groups: Mapping[str, Sequence[int]], stage: Sequence[Sequence[int]]) -> Gangs:
        dp, tp, pp = (_member(root, groups[name], name) for name in ("dp", "tp", "pp"))
        return cls(root, dp, tp, pp, tuple(groups["dp"]), tuple(map(tuple, stage)))

    def fork(self, name: str) -> Gangs:
        """An independent set over the same processes, for another thread; `name` is for messages.

        Called by all ranks, in the same order as other forks. It costs nothing until first used. The forks and the set
        that they came from are closed each by itself.
        """
        root, dp, tp, pp = (
            _member(gang, range(gang.size), f"{gang.name}/{name}") for gang in (self.root, self.dp, self.tp, self.pp)
        )
        return Gangs(root, dp, tp, pp, self.dp_ranks, self.stage)

    def close(self) -> None:
        """Give back connections and threads of this set (not of its forks). Never waits for peers."""
        for gang in (self.root, self.dp, self.tp, self.pp):
            gang.close()


def mesh_groups(grid: list[Any], names: tuple[str, ...], rank: int) -> dict[str, list[int]]:
    """This rank's dp, tp and pp ranks in a (nested) grid of ranks whose dimensions have these names."""
    places = dict(_places(grid))
    own = next(place for place, there in places.items() if there == rank)

    def along(dims: list[int]) -> list[int]:
        fixed = [dim for dim in range(len(own)) if dim not in dims]
        return [there for place, there in places.items() if all(place[dim] == own[dim] for dim in fixed)]

    dims = {name: [dim for dim, its in enumerate(names) if its == name] for name in ("tp", "pp")}
    rest = [dim for dim in range(len(own)) if dim not in dims["tp"] + dims["pp"]]
    return {"dp": along(rest), "tp": along(dims["tp"]), "pp": along(dims["pp"])}


def _places(grid: Any, place: tuple[int, ...] = ()) -> list[tuple[tuple[int, ...], int]]:
    """Every rank with its coordinates, in row-major order."""
    if isinstance(grid, int):
        return [(place, grid)]
    return [found for i, part in enumerate(grid) for found in _places(part, (*place, i))]


def _member(gang: Gang, ranks: Sequence[int], name: str) -> Gang:
    member = gang.subgang(ranks, name)
    assert member is not None, f"rank {gang.rank} is not among {ranks}"
    return member


@dataclass(frozen=True)
class _Job:
    """What was found out about the job that this process is part of."""

    make_store: Callable[[], Store]
    rank: int
    size: int
    with_gloo: bool

    def gang(self, ranks: Sequence[int], timeout: timedelta) -> Gang:
        """A gang of these ranks of the job, called by all of them; they agree on a nonce first."""
        run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        members = uuid.uuid5(uuid.NAMESPACE_OID, "-".join(map(str, ranks))).hex[:16]
        own = list(ranks).index(self.rank)
        place = f"start/{run}/{members}"
        nonce = agree_on_nonce(
            self.make_store,
            place=place,
            rank=own,
            size=len(ranks),
            label=f"{run}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
            timeout=timeout,
        )
        here: dict[str, Any] = {"rank": own, "size": len(ranks), "nonce": nonce}
        here["roll"] = roll_of(place=place, nonce=nonce, size=len(ranks))
        if not self.with_gloo or len(ranks) > _MOST_LINKS:
            return StoreGang(self.make_store, **here)
        from shardckpt.gang.process_group import ProcessGroupGang

        # Gloo heeds this variable only for groups that it chooses the device of.
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
        return ProcessGroupGang(self.make_store, interface=interface, **here)


def _initialised() -> _Job | None:
    """The job, if `torch.distributed` is initialised. Does not import torch: who initialised it has."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store()
    return _Job(lambda: _another_client(store), dist.get_rank(), dist.get_world_size(), dist.is_gloo_available())


def _launched(environ: Mapping[str, str], timeout: timedelta) -> _Job | None:
    """The job, if a launcher has described it in the environment."""
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if size == 1:
        return _Job(_no_store, rank, size, with_gloo=False)
    if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
        raise ValueError("RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT: start with torchrun")
    host, port = environ["MASTER_ADDR"].strip("[]"), int(environ["MASTER_PORT"])  # an IPv6 address may be in brackets
    import torch.distributed as dist

    def connect(*, is_master: bool = False) -> Any:
        # multi_tenant: `init_process_group` may host its own store in this process on the same port later.
        return dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=is_master, timeout=timeout, wait_for_workers=False, multi_tenant=is_master
        )

    hosts = rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    server = connect(is_master=True) if hosts else None

    def make_store(_server: Any = server) -> Any:  # keeps the server alive as long as a gang may connect to it
        return connect()

    return _Job(make_store, rank, size, with_gloo=False)


def _no_store() -> Store:
    raise AssertionError("one process needs no store")


def _another_client(store: Any) -> Any:
    """A client for one thread to the same place. Two threads on one TCPStore client wait for each other.

    2026-11-27: not so for a store in a file. There the end of a client locks the file, and holds the interpreter while
    it waits: when a rank was stopped that had the file locked, the whole process of another stood still that only
    dropped a client. Its threads share the client of the job, which waits for nothing but that lock anyway.
    """
    if isinstance(_lowest(store), sys.modules["torch.distributed"].FileStore):
        return store
    if hasattr(store, "clone"):
        return store.clone()
    if hasattr(store, "underlying_store"):  # before torch 2.8; the prefix is not needed, ours is unique
        return _another_client(store.underlying_store)
    if hasattr(store, "host"):
        return type(store)(store.host, store.port, is_master=False, wait_for_workers=False, timeout=store.timeout)
    return store


def _lowest(store: Any) -> Any:
    """What lies below all prefixes."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def ranks_of_machine() -> int:
    """How many ranks of this job share this machine, as the launcher says (torchrun, Slurm, MPI); 1 if it does not."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        digits = re.match(r"\d+", os.environ.get(name, ""))  # Slurm: "8", or "8(x2),4" of several machines
        if digits:
            return max(1, int(digits[0]))
    return 1
