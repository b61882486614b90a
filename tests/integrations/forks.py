"""Ranks for trainings of frameworks that take seconds to import: one process imports them, once, and forks the ranks.

So a rank may be killed, and another be there in its place a moment later, at the price of a fork.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardckpt.testing.pool import ProcessPool


@dataclass(frozen=True)
class Ended:
    """How a rank ended: with a value, by an exception (`trace`), or by a signal, the one of `killed`."""

    value: Any = None
    trace: str = ""
    killed: int = 0

    @property
    def is_good(self) -> bool:
        return not self.trace and not self.killed


class Forks:
    """The process that imports. `fn(rank, world_size, folder, *args)` is a function of a module, as for the pool.

    It finds `torch.distributed` initialised with gloo, if there are several ranks, and RANK, WORLD_SIZE and LOCAL_RANK
    as torchrun sets them.
    """

    def __init__(self, pool: ProcessPool) -> None:
        self._pool = pool

    def run(
        self, world_size: int, fn: Callable[..., Any], *args: Any, preload: Sequence[str] = (), timeout: float = 100
    ) -> list[Any]:
        """What it returned, by rank; AssertionError with the tracebacks of those that did not return."""
        ended = self.run_settled(world_size, fn, *args, preload=preload, timeout=timeout)
        bad = {rank: one.trace or f"killed by signal {one.killed}" for rank, one in enumerate(ended) if not one.is_good}
        assert not bad, "\n".join(f"rank {rank}:\n{what}" for rank, what in bad.items())
        return [one.value for one in ended]

    def run_settled(
        self, world_size: int, fn: Callable[..., Any], *args: Any, preload: Sequence[str] = (), timeout: float = 100
    ) -> list[Ended]:
        """How it ended on each rank. When one is killed, so are the others, as by torchrun; so are all at the end of
        `timeout` (seconds). `preload`: modules that the process is to have imported before it forks."""
        limits = {"timeout": timeout + 60, "backend": None}
        return self._pool.run(1, _fork_ranks, world_size, fn, args, tuple(preload), timeout, **limits)[0]


def _fork_ranks(
    rank: int,
    _: int,
    folder: Path,
    world_size: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    preload: Sequence[str],
    timeout: float,
) -> list[Ended]:
    """In the process that imports."""
    for module in preload:
        import_module(module)
    gc.freeze()  # no collection in a fork looks through the framework, which copies the memory of all of it
    pids = [_forked(own, world_size, folder, fn, args) for own in range(world_size)]
    statuses = _waited(pids, deadline=time.monotonic() + timeout)
    return [_ended(folder / f"result_{own}", status) for own, status in enumerate(statuses)]


def _forked(rank: int, world_size: int, folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        value, trace = _act(rank, world_size, folder, fn, args), ""
    except BaseException:
        value, trace = None, traceback.format_exc()
    with suppress(BaseException):
        (folder / f"result_{rank}").write_bytes(pickle.dumps(Ended(value, trace)))
    os._exit(0)


def _act(rank: int, world_size: int, folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    # As in a program of its own, and not that of the pool, whose semaphores (tqdm makes one) outlive a fork.
    multiprocessing.set_start_method("fork", force=True)
    if world_size == 1:
        return fn(rank, world_size, folder, *args)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)})
    os.environ.update({"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    store = dist.FileStore(str(folder / "store"), world_size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    value = fn(rank, world_size, folder, *args)
    if dist.is_initialized():  # a framework may have ended it
        dist.barrier()
        dist.destroy_process_group()
    return value


def _waited(pids: Sequence[int], *, deadline: float) -> list[int]:
    """The status of each, as `os.waitpid` gives it."""
    poll, waiting = select.poll(), {os.pidfd_open(pid): pid for pid in pids}
    for descriptor in waiting:
        poll.register(descriptor, select.POLLIN)
    statuses: dict[int, int] = {}
    while waiting:
        left = max(0.0, deadline - time.monotonic())
        ready = [descriptor for descriptor, _ in poll.poll(left * 1000)]
        for descriptor in ready:
            poll.unregister(descriptor)
            os.close(descriptor)
            pid = waiting.pop(descriptor)
            statuses[pid] = os.waitpid(pid, 0)[1]
        if not ready or any(os.WIFSIGNALED(status) for status in statuses.values()):
            for pid in waiting.values():
                os.kill(pid, signal.SIGKILL)
    return [statuses[pid] for pid in pids]


def _ended(file: Path, status: int) -> Ended:
    if os.WIFSIGNALED(status):
        return Ended(killed=os.WTERMSIG(status))
    if not file.exists():
        return Ended(trace=f"it ended with status {os.waitstatus_to_exitcode(status)} and left no result")
    ended: Ended = pickle.loads(file.read_bytes())
    return ended
