"""How the ranks of a job find each other: by which address, in whose store, and what an earlier job left there."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

import shardckpt as sc
from shardckpt.gang import Gangs
from shardckpt.testing.gang_acts import LONG
from shardckpt.testing.pool import ProcessPool, RankLostError
from tests.faults.gangwork import Trap, blank_state, make_state, same

YEAR_S = 365 * 86400.0


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture
def agent_store() -> Iterator[int]:
    """The port of a store as torchrun's agent hosts it for its workers."""
    # Not libuv's server, which leaves a pipe open in this process for ever.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False)
    yield store.port
    del store  # the server ends with it


def place(rank: int, size: int, host: str, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": host, "MASTER_PORT": str(port)}


def of_agent(rank: int, size: int, port: int, run: str) -> dict[str, str]:
    """What torchrun tells its workers; the count of restarts is the node's own and says nothing."""
    told = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": run, "TORCHELASTIC_RESTART_COUNT": "0"}
    return {**place(rank, size, "127.0.0.1", port), **told}


def a_life(root: Path, rank: int, *, dies: bool = False) -> dict[str, Any]:
    """Resume, save the next step. One that dies does so in that save."""
    gangs, state = Gangs.from_env(timeout=LONG), blank_state(rank)
    try:
        with sc.CheckpointManager(root, gangs, timeout=LONG) as checkpoints:
            resumed = checkpoints.resume({"model": state["model"]}, policy=sc.LoadPolicy(unexpected="ignore"))
            step = resumed.step if resumed else 0
            alike = resumed is None or same_model(state, make_state(rank, step))
            after: dict[str, Any] = make_state(rank, step + 1)
            if dies:
                after["end"] = Trap(lambda: os.kill(os.getpid(), signal.SIGKILL))
            checkpoints.save(step + 1, after, replicated=("model",)).result()
            return {"resumed": step, "alike": alike, "steps": checkpoints.steps()}
    except sc.CheckpointError as error:
        return {"error": str(error)}
    finally:
        gangs.close()


def same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return same({**one, "own": {}, "value": 0}, {**other, "own": {}, "value": 0})


def at_an_address(rank: int, size: int, folder: Path, root: Path, host: str, port: int) -> Any:
    with patch.dict(os.environ, place(rank, size, host, port)):
        return a_life(root, rank)


@pytest.mark.parametrize("host", ["::1", "[::1]", "localhost", "by name"])
def test_an_address_of_any_kind(ranks: ProcessPool, tmp_path: Path, free_port: int, host: str) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    host = socket.gethostname() if host == "by name" else host
    expected = {"resumed": 0, "alike": True, "steps": [1]}
    assert ranks.run(2, at_an_address, tmp_path, host, free_port, backend=None) == [expected] * 2


def a_generation(rank: int, size: int, folder: Path, root: Path, port: int, dies: int) -> Any:
    with patch.dict(os.environ, of_agent(rank, size, port, "one")):
        return a_life(root, rank, dies=rank == dies)


def test_generations_of_any_size_on_one_store(ranks: ProcessPool, tmp_path: Path, agent_store: int) -> None:
    """torchelastic gives its store to the restarted workers, with all that the killed ones have left in it."""
    step = 0
    for size, dies in [(2, 1), (2, -1), (3, 0), (1, -1), (3, -1)]:
        outcomes = ranks.run_settled(size, a_generation, tmp_path, agent_store, dies, backend=None, timeout=60)
        if dies < 0:
            found = [outcome.value for outcome in outcomes]
            expected = {"resumed": step, "alike": True, "steps": list(range(1, step + 2))}
            assert found == [expected] * size, [str(outcome) for outcome in outcomes]
            step += 1
        for rank, outcome in enumerate(outcomes if dies >= 0 else []):
            if rank == dies:
                assert isinstance(outcome.error, RankLostError)
            else:
                assert f"rank {dies} " in outcome.value["error"], str(outcome)


def one_of_two_jobs(rank: int, size: int, folder: Path, root: Path, port: int) -> Any:
    job, own = divmod(rank, 2)
    with patch.dict(os.environ, of_agent(own, 2, port, f"job {job}")):
        for _ in range(job + 1):
            seen = a_life(root / str(job), own)
        return seen


def test_two_jobs_on_one_store(ranks: ProcessPool, tmp_path: Path, agent_store: int) -> None:
    one, two = {"resumed": 0, "alike": True, "steps": [1]}, {"resumed": 1, "alike": True, "steps": [1, 2]}
    assert ranks.run(4, one_of_two_jobs, tmp_path, agent_store, backend=None) == [one, one, two, two]


def with_its_own_clock(rank: int, size: int, folder: Path, root: Path, ahead_s: list[float]) -> Any:
    real = time.time
    with patch("time.time", lambda: real() + ahead_s[rank]):
        gangs, state = Gangs.from_env(), blank_state(rank)
        with sc.CheckpointManager(root, gangs, keep=sc.KeepLast(2), timeout=timedelta(seconds=20)) as checkpoints:
            resumed = checkpoints.resume(state)
            step = resumed.step if resumed else 0
            pending = checkpoints.save(step + 1, make_state(rank, step + 1), replicated=("model",))
            pending.result()
            checkpoints.prune()  # as has been begun when the save was over
            steps = checkpoints.steps()
        gangs.close()
        return step, steps, 0 <= pending.report.total_s < 20


def test_clocks_that_differ_decide_nothing(ranks: ProcessPool, tmp_path: Path) -> None:
    """A rank that is a year ahead, then behind; then the first rank is the one that is ahead, and then behind."""
    clocks = [[0.0, YEAR_S], [0.0, -YEAR_S], [YEAR_S, 0.0], [-YEAR_S, 0.0]]
    for before, ahead_s in enumerate(clocks):
        kept = list(range(max(1, before), before + 2))
        assert ranks.run(2, with_its_own_clock, tmp_path, ahead_s) == [(before, kept, True)] * 2
