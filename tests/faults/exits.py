"""Programs that end in some way while a save is under way. `python -m tests.faults.exits ROOT` runs them all, each in a
process of its own that is a fork of this one: importing torch once is enough. The one of two ranks finds what torchrun
would tell it in its environment, and a store that outlives it."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import shardckpt as sc
import shardckpt.engine.background.worker  # so that what is registered here to be done at the end is done before
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.faults import GatedStorage, on

PATIENCE_S = 60.0
"""A program that takes longer hangs."""


def state() -> dict[str, Any]:
    return {"w": torch.arange(90_000.0)}  # a model and an optimizer import much, which Python then takes down again


def until_the_end(root: Path) -> GatedStorage:
    """Writes when the interpreter has begun to end, and not before."""
    gated = GatedStorage(LocalStorage(root), on("put", key=".pt"))
    threading._register_atexit(gated.open_gate)  # type: ignore[attr-defined]
    return gated


def for_ever(root: Path) -> GatedStorage:
    return GatedStorage(LocalStorage(root), on("put", key=".pt"), limit=timedelta(hours=1))


def save(storage: GatedStorage, **options: Any) -> sc.CheckpointManager:
    checkpoints = sc.CheckpointManager(storage, saving=sc.SavePolicy(in_flight=2), **options)
    checkpoints.save(1, state())
    assert storage.reached.wait(PATIENCE_S)
    return checkpoints


def simply_ends(root: Path) -> None:
    """Nothing refers to the manager any more."""
    save(until_the_end(root))


def raises(root: Path) -> None:
    checkpoints = save(until_the_end(root))
    raise RuntimeError(f"the loss is gone, {checkpoints!r} is not closed")


def is_interrupted(root: Path) -> None:
    with sc.CheckpointManager(root) as checkpoints:
        checkpoints.save(1, state())
        signal.raise_signal(signal.SIGINT)


def is_interrupted_twice_where_the_storage_hangs(root: Path) -> None:
    """The second time while it waits for the save, at the end of the `with`."""
    with sc.CheckpointManager(for_ever(root), timeout=timedelta(seconds=2)) as checkpoints:
        checkpoints.save(1, state())
        main = threading.main_thread().ident or 0
        threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        signal.raise_signal(signal.SIGINT)


def ends_where_the_storage_hangs(root: Path) -> None:
    save(for_ever(root), timeout=timedelta(seconds=1))


def forks_meanwhile(root: Path) -> None:
    """As a data loader does. The end of the child must not wait for the save, nor do it."""
    checkpoints = save(until_the_end(root))
    checkpoints.save(2, state(), deadline=timedelta(seconds=PATIENCE_S))  # not begun yet
    child = os.fork()
    if child and _status(child, time.monotonic() + PATIENCE_S / 2) != 0:
        os._exit(9)


ALONE: dict[Callable[[Path], None], tuple[int, bool]] = {
    simply_ends: (0, True),
    raises: (1, True),
    forks_meanwhile: (0, True),
    is_interrupted: (-signal.SIGINT, True),
    is_interrupted_twice_where_the_storage_hangs: (-signal.SIGINT, False),
    ends_where_the_storage_hangs: (0, False),
}
"""Each program, how it ends, and whether it leaves a checkpoint."""


def destroys_the_group_and_raises(root: Path) -> None:
    """Two ranks. Of two saves one is under way when the group is destroyed, and one is begun afterwards."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    checkpoints = sc.CheckpointManager(root, timeout=timedelta(seconds=60))
    checkpoints.save(1, state() | {"rank": rank})
    dist.destroy_process_group()
    checkpoints.save(2, state())
    if rank:
        raise RuntimeError("the loss of rank 1 is gone")


def run_all(root: Path) -> dict[str, Any] | None:
    """How each ended; None in the processes that end in these ways."""
    children: dict[str, int] = {}
    with sc.CheckpointManager(root / "first") as checkpoints:  # has imported whatever is imported at its first use
        checkpoints.save(1, state())
    assert threading.active_count() == 1
    gc.freeze()  # at its end each looks for garbage: a second, if it goes through all that was imported, and copies it
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for program in ALONE:
        child = os.fork()
        if not child:
            return _begin(program, root)
        children[program.__name__] = child
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            return _begin(destroys_the_group_and_raises, root)
        children[f"{destroys_the_group_and_raises.__name__} {rank}"] = child
    end = time.monotonic() + PATIENCE_S
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # has threads: after all forks
    statuses = {name: _status(child, end) for name, child in children.items()}
    del store
    return statuses


def _begin(program: Callable[[Path], None], root: Path) -> None:
    sys.stdout = sys.stderr
    program(root / program.__name__)


def _status(child: int, end: float) -> int | str:
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        threading.Event().wait(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


if __name__ == "__main__":
    torch.set_num_threads(1)
    if (found := run_all(Path(sys.argv[1]))) is not None:
        print(json.dumps(found))
