"""What runs inside one process of a `ProcessPool`: it waits for calls, and does them as one rank of a process group."""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardckpt.testing.meshes import Meshes


@dataclass(frozen=True, slots=True)
class Call:
    """From the pool to a process: do this as this rank."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    world_size: int
    folder: Path
    """Of this call alone, the same on all ranks; holds the file store of the process group."""
    backend: str | None
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Returned:
    """From a process to the pool: `fn` came back."""

    value: Any
    clean: bool
    """Nothing of the call is left in the process, so it can be used again."""


@dataclass(frozen=True, slots=True)
class Raised:
    """From a process to the pool: `fn` raised. The exception is in parts, as its class may not unpickle by itself."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    state: dict[str, Any]
    trace: str

    def error(self) -> BaseException:
        """The exception as it was raised, less its cause and traceback."""
        error = self.kind.__new__(self.kind, *self.args)
        error.args = self.args
        error.__dict__.update(self.state)
        return error


def serve(connection: Connection, output: Path, faults: Path) -> None:
    """The process's main: do calls until the pool says stop (None) or is gone.

    What is printed goes to the file `output`; the tracebacks of all threads go to `faults` when a call hangs, in which
    case the process ends itself, and when the process crashes.
    """
    torch.set_num_threads(1)
    meshes = Meshes()
    with output.open("wb", buffering=0) as printed, faults.open("wb", buffering=0) as dumped:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        faulthandler.enable(dumped)
        while True:
            try:
                message = connection.recv_bytes()
            except (EOFError, OSError):
                return
            call: Call | None = None
            try:
                call = pickle.loads(message)
            except Exception as error:  # the test's module, or an argument, cannot be loaded here
                connection.send_bytes(_pack(_raised(error)))
                continue
            if call is None:
                return
            printed.seek(0)  # of the descriptors 1 and 2, too: they share the position
            printed.truncate()
            faulthandler.dump_traceback_later(call.timeout_s, exit=True, file=dumped)
            answer = _pack(_do(call, meshes))
            faulthandler.cancel_dump_traceback_later()
            connection.send_bytes(answer)


def _do(call: Call, meshes: Meshes) -> Returned | Raised:
    threads = set(threading.enumerate())
    try:
        if call.backend is not None:
            # Shorter than the deadline of the whole call: a collective that waits in vain raises and says where.
            timeout = timedelta(seconds=0.75 * call.timeout_s)
            store = dist.FileStore(str(call.folder / "store"), call.world_size)  # type: ignore[attr-defined]
            dist.init_process_group(
                call.backend, store=store, rank=call.rank, world_size=call.world_size, timeout=timeout
            )
            # A rank that has nothing to do would close its connections while another still makes its own to it.
            dist.barrier()
        value = call.fn(call.rank, call.world_size, call.folder, *call.args)
    except BaseException as error:
        return _raised(error)
    finally:
        left_over = call.backend is None and dist.is_initialized()
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
    clean = not left_over and all(thread in threads for thread in threading.enumerate()) and meshes.forget()
    return Returned(value, clean)


def _raised(error: BaseException) -> Raised:
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Raised(type(error), error.args, dict(error.__dict__), trace)


def _pack(answer: Returned | Raised) -> bytes:
    """By plain pickle: a tensor travels as its bytes, and no shared memory outlives its process.

    An answer that cannot be pickled, or not unpickled on the other side, becomes an error that says so.
    """
    try:
        packed = pickle.dumps(answer)
        if isinstance(again := pickle.loads(packed), Raised):
            again.error()
    except Exception as problem:
        told = answer.trace if isinstance(answer, Raised) else f"value: {answer.value!r}"
        return pickle.dumps(Raised(RuntimeError, (f"the answer does not pickle ({problem}); {told}",), {}, told))
    return packed
