"""The gangs of a job: who is with whom along each dimension, and how a process finds out."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from shardckpt.gang import Gang, Gangs, LocalGang, ProcessGroupGang, StoreGang
from shardckpt.gang.gangs import mesh_groups
from shardckpt.testing.gang_acts import LONG
from shardckpt.testing.gangs import RankHungError, RanksError, run_ranks, run_ranks_settled
from shardckpt.testing.pool import ProcessPool

ROOT = Path(__file__).parents[2]


def members(gang: Gang, number: int) -> Any:
    """The numbers that the ranks of this gang gave, told to all of them."""
    gang.enter("members", timeout=LONG)
    return gang.broadcast(gang.gather(number, timeout=LONG), timeout=LONG)


def shape(gangs: Gangs) -> dict[str, Any]:
    """Who is in each gang, by their ranks in root."""
    rank = gangs.root.rank
    each = {"root": gangs.root, "dp": gangs.dp, "tp": gangs.tp, "pp": gangs.pp}
    found = {name: members(gang, rank) for name, gang in each.items()}
    assert found["dp"] == list(gangs.dp_ranks)
    gangs.tp.enter("stage", timeout=LONG)
    of_tp = gangs.tp.broadcast(gangs.tp.gather(list(gangs.dp_ranks), timeout=LONG), timeout=LONG)
    assert of_tp == [list(ranks) for ranks in gangs.stage]
    return found


def test_one_process_is_a_job_without_torch() -> None:
    with patch.dict(os.environ):
        os.environ.pop("RANK", None)
        gangs = Gangs.from_env()
    assert all(isinstance(gang, LocalGang) for gang in (gangs.root, gangs.dp, gangs.tp, gangs.pp))
    assert shape(gangs.fork("save")) == {"root": [0], "dp": [0], "tp": [0], "pp": [0]}


@pytest.mark.parametrize("environ", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_a_degree_that_does_not_divide_the_job_is_refused(environ: dict[str, str]) -> None:
    with patch.dict(os.environ, environ), pytest.raises(ValueError, match="tp=2 x pp=1 does not divide the 1 ranks"):
        Gangs.from_env(tp=2)


def test_a_launcher_without_an_address_is_refused() -> None:
    with patch.dict(os.environ, {"RANK": "0", "WORLD_SIZE": "2"}):
        os.environ.pop("MASTER_ADDR", None)
        with pytest.raises(ValueError, match="MASTER_ADDR"):
            Gangs.from_env()


def test_importing_the_gangs_does_not_import_torch() -> None:
    code = "import sys, shardckpt.gang; shardckpt.gang.Gangs.from_env(); sys.exit('torch' in sys.modules)"
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, check=True, timeout=60)


def test_tensor_parallel_ranks_are_neighbours() -> None:
    assert run_ranks(4, shape, tp=2) == [
        {"root": [0, 1, 2, 3], "dp": [0, 2], "tp": [0, 1], "pp": [0]},
        {"root": [0, 1, 2, 3], "dp": [1, 3], "tp": [0, 1], "pp": [1]},
        {"root": [0, 1, 2, 3], "dp": [0, 2], "tp": [2, 3], "pp": [2]},
        {"root": [0, 1, 2, 3], "dp": [1, 3], "tp": [2, 3], "pp": [3]},
    ]


def test_ranks_are_numbered_dp_then_pp_then_tp() -> None:
    store: Any = dist.HashStore()

    def act(gangs: Gangs) -> Any:
        root = StoreGang(lambda: store, rank=gangs.root.rank, size=8, nonce="cube")
        cube = Gangs.of(root, tp=2, pp=2)
        found = shape(cube)
        cube.close()
        return found

    found = run_ranks(8, act)
    assert found[5] == {"root": list(range(8)), "dp": [1, 5], "tp": [4, 5], "pp": [5, 7]}
    grid = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    for rank in range(8):
        assert mesh_groups(grid, ("dp", "pp", "tp"), rank) == {name: found[rank][name] for name in ("dp", "pp", "tp")}


def test_all_dimensions_of_a_mesh_but_tp_and_pp_are_data_parallel() -> None:
    grid = [[[0, 4], [1, 5]], [[2, 6], [3, 7]]]
    assert mesh_groups(grid, ("replicate", "tp", "shard"), 5) == {"dp": [1, 5, 3, 7], "tp": [4, 5], "pp": [5]}
    assert mesh_groups(grid, (), 5) == {"dp": [0, 4, 1, 5, 2, 6, 3, 7], "tp": [5], "pp": [5]}
    assert mesh_groups([3, 1, 2], ("tp",), 1) == {"dp": [1], "tp": [3, 1, 2], "pp": [1]}


def test_forks_are_independent_sets_for_other_threads() -> None:
    """Two threads per rank hold long conversations at the same time, each in a set of its own."""

    def act(gangs: Gangs) -> Any:
        forks = {name: gangs.fork(name) for name in ("save", "load")}
        told: dict[str, Any] = {}

        def converse(name: str) -> None:
            forks[name].root.enter("talk", timeout=LONG)
            told[name] = [forks[name].root.broadcast(f"{name} {i}", timeout=LONG) for i in range(50)]

        threads = [threading.Thread(target=converse, args=(name,)) for name in forks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        groups = forks["save"].tp.name, forks["save"].dp_ranks == gangs.dp_ranks
        for fork in forks.values():
            fork.close()
        return told, groups

    for told, groups in run_ranks(2, act, tp=2):
        assert told == {name: [f"{name} {i}" for i in range(50)] for name in ("save", "load")}
        assert groups == ("tp/save", True)


def on_mesh(rank: int, size: int, folder: Path) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp"))
    gangs, sub = Gangs.from_mesh(mesh), Gangs.from_mesh(mesh["tp"])
    found = shape(gangs), shape(sub), isinstance(gangs.root, ProcessGroupGang)
    gangs.close()
    sub.close()
    return found


def test_a_device_mesh_says_who_is_with_whom(ranks: ProcessPool) -> None:
    for rank, (whole, sub, over_gloo) in enumerate(ranks.run(4, on_mesh)):
        row = [0, 1] if rank < 2 else [2, 3]
        assert whole == {"root": [0, 1, 2, 3], "dp": [rank % 2, rank % 2 + 2], "tp": row, "pp": [rank]}
        assert sub == {"root": [0, 1], "dp": [rank % 2], "tp": [0, 1], "pp": [rank % 2]}, "numbered within the mesh"
        assert over_gloo


def under_a_launcher(rank: int, size: int, folder: Path, port: int, agent: dict[str, str]) -> Any:
    """As under srun: rank 0 hosts a store, if there is none of an agent; the program makes its process group later."""
    environ = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **agent,
    }
    with patch.dict(os.environ, environ):
        before = Gangs.from_env(tp=2)
        first = shape(before)
        dist.init_process_group("gloo", timeout=LONG)
        after = Gangs.from_env(tp=2)
        second = shape(after)
        kinds = type(before.root).__name__, type(after.root).__name__
        fork = before.fork("again")
        again = shape(fork)["root"]
        fork.close()
        dist.barrier()
        after.close()
        dist.barrier()  # rank 0 hosts the store of all: it must be the last to leave
        before.close()
        dist.destroy_process_group()
    return first == second, first["root"], again, kinds


def test_a_job_can_be_found_before_and_after_its_process_group_is_made(ranks: ProcessPool, free_port: int) -> None:
    expected = (True, [0, 1], [0, 1], ("StoreGang", "ProcessGroupGang"))
    assert ranks.run(2, under_a_launcher, free_port, {}, backend=None) == [expected] * 2


def test_so_it_is_where_an_agent_has_the_store(ranks: ProcessPool, port: int) -> None:
    """As torchrun's, whose store outlives the ranks."""
    expected = (True, [0, 1], [0, 1], ("StoreGang", "ProcessGroupGang"))
    told = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": uuid.uuid4().hex}
    told["TORCHELASTIC_RESTART_COUNT"] = "0"
    assert ranks.run(2, under_a_launcher, port, told, backend=None) == [expected] * 2


TORCHRUN_SCRIPT = """
import torch.distributed as dist
from shardckpt.gang import Gangs, together_gather
from datetime import timedelta

T = timedelta(seconds=60)
for make in (None, "gloo"):
    if make:
        dist.init_process_group(make, timeout=T)
    gangs = Gangs.from_env(timeout=T)
    save = gangs.fork("save")
    save.root.enter("one", timeout=T)
    ranks = together_gather(save.root, lambda: save.root.rank, phase="hello", timeout=T)
    if ranks is not None:
        print("FOUND", type(save.root).__name__, ranks, flush=True)
    save.close()
    gangs.close()
dist.destroy_process_group()
"""


@pytest.mark.larger
def test_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(TORCHRUN_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100)
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert found == ["FOUND StoreGang [0, 1]", "FOUND ProcessGroupGang [0, 1]"], done.stderr[-5000:]
    assert done.returncode == 0


def test_ranks_as_threads_tell_which_failed_and_where() -> None:
    def act(gangs: Gangs) -> int:
        if gangs.root.rank == 1:
            raise KeyError("missing")
        return gangs.root.rank

    with pytest.raises(RanksError, match=r"rank 1: KeyError(.|\n)*raise KeyError") as caught:
        run_ranks(3, act)
    assert list(caught.value.errors) == [1]
    first, second, third = run_ranks_settled(3, act)
    assert (first, third) == (0, 2)
    assert isinstance(second, KeyError)


def test_a_rank_that_hangs_is_shown_where_it_hangs() -> None:
    released = threading.Event()

    def hang_here(gangs: Gangs) -> None:
        if gangs.root.rank == 1:
            released.wait(30)

    with pytest.raises(RanksError, match="hang_here") as caught:
        run_ranks(2, hang_here, timeout=LONG / 100)
    released.set()
    assert isinstance(caught.value.errors[1], RankHungError)
