"""A warm pool of processes that act as ranks: starting four takes seconds once, and milliseconds for each test."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from shardckpt.testing.rankprocess import Call, Raised, Returned, serve

_GRACE_S = 3.0
"""How long after its deadline a process may take to dump its threads and end by itself, before it is killed."""
_PRELOAD = (
    "pytest",
    "shardckpt.engine.load",
    "shardckpt.engine.save",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "shardckpt.testing.rankprocess",  # the last: it looks through what there is by then (`meshes.py`)
)
"""What the server imports before it forks: seconds that no process has to spend again."""
_TAIL = 8000
"""Characters of a rank's output, from its end, that an error quotes."""


class RankLostError(Exception):
    """The process of a rank ended before `fn` came back: killed, crashed, or ended by itself.

    `exitcode` is negative for a signal, as in `subprocess`.
    """

    def __init__(self, message: str, *, exitcode: int | None = None) -> None:
        super().__init__(message)
        self.exitcode = exitcode


class RankHungError(RankLostError, TimeoutError):
    """`fn` was still running at the deadline; the process dumped its threads and was ended."""


class RanksFailedError(Exception):
    """`run`: some ranks did not return. Its message holds every traceback; `outcomes` are those of all ranks."""

    def __init__(self, message: str, *, outcomes: list[Outcome]) -> None:
        super().__init__(message)
        self.outcomes = outcomes


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended on one rank: with a value, or with an error (a `RankLostError` if its process is gone)."""

    rank: int
    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    """The traceback in that process; for one that hung or crashed, of all of its threads."""
    output: str = ""
    """The end of what a failed rank printed."""

    def __str__(self) -> str:
        if self.error is None:
            return f"rank {self.rank}: returned {self.value!r}"
        printed = f"\n-- it printed:\n{self.output}" if self.output else ""
        return f"rank {self.rank}: {type(self.error).__name__}: {self.error}\n{self.trace}{printed}"


class _Worker:
    """One process and the pool's end of its connection."""

    def __init__(self, number: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        open_before = _descriptors()
        self.output, self.faults = folder / f"output_{number}", folder / f"faults_{number}"
        self.connection, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(
            target=serve, args=(theirs, self.output, self.faults), name=f"rank-process-{number}", daemon=True
        )
        self.process.start()
        theirs.close()
        self.filenos = frozenset(fileno for fileno, _ in _descriptors() - open_before)
        """Of the connection, and those by which `multiprocessing` watches the process, of which it tells only one."""

    def close(self, *, kill: bool) -> None:
        """End the process, and wait until it has; nothing of it is left open here."""
        if kill:
            self.process.kill()
        else:
            self.connection.close()  # the process reads the end of the stream, and leaves
            self.process.join(_GRACE_S)
            self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()
        self.output.unlink(missing_ok=True)
        self.faults.unlink(missing_ok=True)


class ProcessPool:
    """Runs a function on several ranks at once, each in a process of its own that is used again and again.

    For tests: make one per test session, and use it from one thread. Processes are forked, when first needed, from a
    server process that has imported torch, so a test module must be importable by name. A process in which a call
    raised, died, hung, or left threads or a process group behind is replaced: the next call finds only clean ones.
    """

    def __init__(self) -> None:
        """Starts the server; it and multiprocessing's resource tracker stay for the life of this process."""
        forkserver.set_forkserver_preload(list(_PRELOAD))
        forkserver.ensure_running()
        resource_tracker.ensure_running()
        self._folder = tempfile.TemporaryDirectory(prefix="shardckpt-ranks-")
        self._workers: dict[int, _Worker] = {}
        """By rank: a process never becomes another one. torch keeps meshes, with the place that their process has in
        them, and gives them again for equal ones."""
        self._numbers = itertools.count()

    def run(
        self,
        world_size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 100.0,
        backend: str | None = "gloo",
    ) -> list[Any]:
        """What `fn(rank, world_size, folder, *args)` returned, by rank; `RanksFailedError` if any did not return.

        `fn` is a function of a module, by name; `fn`, arguments and values are pickled. It finds `torch.distributed`
        initialised with `backend` (None: it is not), and `folder`, a fresh `Path` that all ranks of this call share.
        `timeout` in seconds; a rank that takes longer is ended, and all its threads' tracebacks are in the error.
        """
        outcomes = self.run_settled(world_size, fn, *args, timeout=timeout, backend=backend)
        failed = [str(outcome) for outcome in outcomes if outcome.error is not None]
        if failed:
            raise RanksFailedError(
                f"{len(failed)} of {world_size} ranks failed\n\n" + "\n\n".join(failed), outcomes=outcomes
            )
        return [outcome.value for outcome in outcomes]

    def run_settled(
        self,
        world_size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 100.0,
        backend: str | None = "gloo",
    ) -> list[Outcome]:
        """Like `run`, for tests of failures: how it ended on each rank; no rank's error is raised."""
        with tempfile.TemporaryDirectory(prefix="call_", dir=self._folder.name) as folder:
            messages = [
                pickle.dumps(Call(fn, args, rank, world_size, Path(folder), backend, timeout))
                for rank in range(world_size)
            ]
            workers = self._enough(world_size)
            keep: list[_Worker] = []
            try:
                for worker, message in zip(workers, messages, strict=True):
                    with suppress(ConnectionError):  # it has died since; there will be no answer, which tells
                        worker.connection.send_bytes(message)
                answers = _collect(workers, deadline=time.monotonic() + timeout + _GRACE_S)
                pairs = list(zip(workers, answers, strict=True))
                outcomes = [_outcome(rank, worker, answer) for rank, (worker, answer) in enumerate(pairs)]
                keep = [worker for worker, answer in pairs if isinstance(answer, Returned) and answer.clean]
            finally:  # also when interrupted: an answer that is still on its way must not meet the next call
                self._drop(worker for worker in workers if worker not in keep)
        return outcomes

    def _enough(self, count: int) -> list[_Worker]:
        self._drop([worker for worker in self._workers.values() if not worker.process.is_alive()])
        for rank in range(count):
            if rank not in self._workers:
                self._workers[rank] = _Worker(next(self._numbers), Path(self._folder.name))
        return [self._workers[rank] for rank in range(count)]

    def _drop(self, workers: Iterable[_Worker]) -> None:
        dropped = list(workers)
        for rank, worker in list(self._workers.items()):
            if worker in dropped:
                del self._workers[rank]
                worker.close(kill=True)

    def filenos(self) -> Iterator[int]:
        """The file descriptors that the pool holds open, for those who count descriptors."""
        for worker in self._workers.values():
            yield from worker.filenos

    def close(self) -> None:
        """End all processes."""
        while self._workers:
            self._workers.popitem()[1].close(kill=False)
        self._folder.cleanup()

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _collect(workers: list[_Worker], *, deadline: float) -> list[Returned | Raised | None]:
    """Every worker's answer; None for one that is gone, or did not answer by the deadline (seconds, monotonic)."""
    answers: list[Returned | Raised | None] = [None] * len(workers)
    waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for ready in connection.wait(list(waiting), left):
            assert isinstance(ready, connection.Connection)
            rank = waiting.pop(ready)
            try:
                answers[rank] = pickle.loads(ready.recv_bytes())
            except (EOFError, OSError):  # the process is gone, and so is its end
                workers[rank].process.join(_GRACE_S)
    return answers


def _outcome(rank: int, worker: _Worker, answer: Returned | Raised | None) -> Outcome:
    if isinstance(answer, Returned):
        return Outcome(rank, answer.value)
    output = _tail(worker.output)
    if isinstance(answer, Raised):
        return Outcome(rank, error=answer.error(), trace=answer.trace, output=output)
    faults, exitcode = _tail(worker.faults), worker.process.exitcode
    error: RankLostError
    if exitcode is None:
        error = RankHungError("still there after its deadline, stopped or deaf; killed")
    elif faults.startswith("Timeout"):
        error = RankHungError("still running at its deadline", exitcode=exitcode)
    elif exitcode < 0:
        error = RankLostError(f"killed by signal {-exitcode} ({signal.Signals(-exitcode).name})", exitcode=exitcode)
    else:
        error = RankLostError(f"the process ended with status {exitcode}", exitcode=exitcode)
    return Outcome(rank, error=error, trace=faults, output=output)


def _descriptors() -> frozenset[tuple[int, str]]:
    """The file descriptors that are open in this process, with what each is; none where the system does not tell.

    With that, for a thread of somebody else's may close one whose number is then taken again.
    """
    folder = Path("/proc/self/fd")
    found = set[tuple[int, str]]()
    for name in os.listdir(folder) if folder.is_dir() else ():
        with suppress(OSError):  # the one that listed them
            found.add((int(name), os.readlink(folder / name)))
    return frozenset(found)


def _tail(file: Path) -> str:
    return file.read_text(errors="replace")[-_TAIL:] if file.exists() else ""
