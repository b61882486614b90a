"""The pool of rank processes: results, errors, deaths, hangs, and that the next call is never the worse for them."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shardckpt.engine.sharding import describe
from shardckpt.errors import CheckpointMismatchError
from shardckpt.testing.pool import Outcome, ProcessPool, RankHungError, RankLostError, RanksFailedError


def total(rank: int, world_size: int, folder: Path, factor: int) -> tuple[int, int, float]:
    assert dist.get_rank() == rank
    assert dist.get_world_size() == world_size
    value = torch.tensor(float(rank))
    dist.all_reduce(value)
    return rank, os.getpid(), value.item() * factor


def give_back(rank: int, world_size: int, folder: Path, value: object) -> object:
    return value


def shared_folder(rank: int, world_size: int, folder: Path) -> str:
    return str(folder)


def group_is_there(rank: int, world_size: int, folder: Path) -> bool:
    return dist.is_initialized()


def pid(rank: int, world_size: int, folder: Path) -> int:
    return os.getpid()


def raise_on_one(rank: int, world_size: int, folder: Path) -> int:
    print(f"hello from {rank}", flush=True)
    if rank == 1:
        raise CheckpointMismatchError("two problems", problems=["a", "b"], step=7)
    return os.getpid()


def leave_a_thread(rank: int, world_size: int, folder: Path) -> int:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    return os.getpid()


def die_on_one(rank: int, world_size: int, folder: Path, how: int) -> int:
    if rank == 1:
        if how == 0:
            os._exit(3)
        os.kill(os.getpid(), how)
    return rank


def stuck_in_a_named_function() -> NoReturn:
    while True:
        threading.Event().wait()
        raise AssertionError("unreachable")


def hang_on_one(rank: int, world_size: int, folder: Path) -> int:
    if rank == 0:
        stuck_in_a_named_function()
    return rank


def stop_on_one(rank: int, world_size: int, folder: Path) -> int:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    return rank


def wait_in_vain(rank: int, world_size: int, folder: Path) -> None:
    if rank == 0:
        dist.barrier()


def unpicklable(rank: int, world_size: int, folder: Path) -> object:
    return threading.Lock()


def places_of_a_copy(rank: int, world_size: int, folder: Path, others: int) -> tuple[list[str], list[str], list[float]]:
    """Groups of the mesh, and of what an operation on its tensor gave, in a world that has `others` groups besides."""
    for _ in range(others):
        dist.new_group()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    copy = distribute_tensor(torch.arange(8.0), mesh, [Shard(0), Shard(0)]).detach()
    describe("copy", copy)
    names = [[group.group_name for group in m.get_all_groups()] for m in (mesh, copy.device_mesh)]
    return names[0], names[1], copy.full_tensor().tolist()


def test_no_mesh_of_an_earlier_call_is_met(ranks: ProcessPool) -> None:
    """torch caches what an operation makes of a placement, with its mesh, and asks with any mesh that is equal; the
    engine caches what a mesh is."""
    before = ranks.run(4, pid)
    for others in (0, 3, 1):
        for mesh, copy, values in ranks.run(4, places_of_a_copy, others):
            assert copy == mesh
            assert values == list(range(8))
    assert ranks.run(4, pid) == before


def test_ranks_meet_in_a_process_group(ranks: ProcessPool) -> None:
    for size in (1, 2, 4, 3):
        assert [(rank, value) for rank, _, value in ranks.run(size, total, 10)] == [
            (rank, 10 * sum(range(size))) for rank in range(size)
        ]


def test_processes_are_used_again(ranks: ProcessPool) -> None:
    first = ranks.run(2, total, 1)
    assert [pid for _, pid, _ in ranks.run(2, total, 1)] == [pid for _, pid, _ in first]
    assert len({pid for _, pid, _ in first} | {os.getpid()}) == 3


def test_a_warm_call_costs_little(ranks: ProcessPool) -> None:
    ranks.run(4, total, 1)
    start = time.monotonic()
    ranks.run(4, total, 1)
    assert time.monotonic() - start < 5  # 0.1 s; an import of torch alone takes 2


def test_without_a_backend_there_is_no_process_group(ranks: ProcessPool) -> None:
    assert ranks.run(2, group_is_there, backend=None) == [False, False]
    assert ranks.run(2, group_is_there) == [True, True]


def test_tensors_travel_by_value(ranks: ProcessPool) -> None:
    value: dict[str, Any] = {"a": torch.arange(5, dtype=torch.bfloat16), "b": [1, "x"]}
    for got in ranks.run(2, give_back, value, backend=None):
        assert torch.equal(got["a"], value["a"])
        assert got["b"] == value["b"]


def test_the_folder_is_shared_by_the_ranks_of_one_call_and_gone_after_it(ranks: ProcessPool) -> None:
    one, other = (ranks.run(2, shared_folder, backend=None) for _ in range(2))
    assert len(set(one)) == len(set(other)) == 1
    assert one != other
    assert not Path(one[0]).exists()


def test_an_error_arrives_with_its_class_attributes_traceback_and_output(ranks: ProcessPool) -> None:
    good, bad = ranks.run_settled(2, raise_on_one, backend=None)
    assert good.error is None
    assert isinstance(bad.error, CheckpointMismatchError)
    assert (bad.error.problems, bad.error.step, str(bad.error)) == (("a", "b"), 7, "two problems")
    assert "in raise_on_one" in bad.trace
    assert bad.output == "hello from 1\n"


def test_run_raises_one_error_with_every_ranks_traceback(ranks: ProcessPool) -> None:
    with pytest.raises(RanksFailedError, match="1 of 2 ranks failed") as caught:
        ranks.run(2, raise_on_one, backend=None)
    assert "rank 1: CheckpointMismatchError: two problems" in str(caught.value)
    assert "in raise_on_one" in str(caught.value)
    assert [outcome.error is None for outcome in caught.value.outcomes] == [True, False]


def test_only_the_process_that_raised_is_replaced(ranks: ProcessPool) -> None:
    before = ranks.run(2, pid, backend=None)
    ranks.run_settled(2, raise_on_one, backend=None)
    after = ranks.run(2, pid, backend=None)
    assert before[0] in after
    assert before[1] not in after


def test_a_process_keeps_its_rank(ranks: ProcessPool) -> None:
    before = ranks.run(3, pid)
    ranks.run_settled(3, raise_on_one)
    after = ranks.run(3, pid)
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]


def test_a_process_with_a_thread_left_behind_is_not_used_again(ranks: ProcessPool) -> None:
    left = ranks.run(2, leave_a_thread, backend=None)
    assert not set(left) & set(ranks.run(2, pid, backend=None))


@pytest.mark.crash
@pytest.mark.parametrize(
    ("how", "message", "exitcode"),
    [
        (signal.SIGKILL, "killed by signal 9 (SIGKILL)", -9),
        (signal.SIGSEGV, "killed by signal 11 (SIGSEGV)", -11),
        (0, "ended with status 3", 3),
    ],
)
def test_a_death_is_reported_and_the_next_call_is_whole(
    ranks: ProcessPool, how: int, message: str, exitcode: int
) -> None:
    alive, dead = ranks.run_settled(2, die_on_one, int(how), backend=None)
    assert alive == Outcome(0, 0)
    assert isinstance(dead.error, RankLostError)
    assert message in str(dead.error)
    assert dead.error.exitcode == exitcode
    if how == signal.SIGSEGV:
        assert "in die_on_one" in dead.trace
    assert [rank for rank, _, _ in ranks.run(2, total, 1)] == [0, 1]


@pytest.mark.crash
def test_a_process_that_died_between_calls_is_replaced(ranks: ProcessPool) -> None:
    (victim,) = ranks.run(1, pid, backend=None)
    os.kill(victim, signal.SIGKILL)
    (outcome,) = ranks.run_settled(1, pid, backend=None)  # it may have been found out before the call, or in it
    assert outcome.value != victim
    assert ranks.run(1, pid, backend=None) != [victim]


@pytest.mark.crash
def test_a_hang_ends_at_its_deadline_with_the_tracebacks_of_its_threads(ranks: ProcessPool) -> None:
    hung, other = ranks.run_settled(2, hang_on_one, backend=None, timeout=1)
    assert isinstance(hung.error, RankHungError)
    assert "stuck_in_a_named_function" in hung.trace
    assert other == Outcome(1, 1)
    assert ranks.run(2, group_is_there) == [True, True]


@pytest.mark.crash
def test_a_stopped_process_is_killed(ranks: ProcessPool) -> None:
    stopped, other = ranks.run_settled(2, stop_on_one, backend=None, timeout=0.2)
    assert isinstance(stopped.error, RankHungError)
    assert "killed" in str(stopped.error)
    assert other == Outcome(1, 1)


def test_a_collective_that_waits_in_vain_raises_before_the_deadline(ranks: ProcessPool) -> None:
    waiting, gone = ranks.run_settled(2, wait_in_vain, timeout=8)
    assert isinstance(waiting.error, RuntimeError)
    assert not isinstance(waiting.error, RankLostError)
    assert gone.error is None


def test_what_does_not_pickle_is_an_error_not_a_hang(ranks: ProcessPool) -> None:
    (outcome,) = ranks.run_settled(1, unpicklable, backend=None)
    assert "does not pickle" in str(outcome.error)
    with pytest.raises(Exception, match=r"pickle|local"):
        ranks.run(1, lambda *_: None, backend=None)
    assert ranks.run(1, give_back, 5, backend=None) == [5]


def test_close_leaves_nothing_behind() -> None:
    with ProcessPool() as pool:
        pids = pool.run(2, pid, backend=None)
        opened = list(pool.filenos())
        assert len(opened) >= 4
    assert not any(psutil.pid_exists(number) for number in pids)
