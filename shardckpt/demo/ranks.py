"""Starts torchrun for one job, listens to its ranks, and leaves none of them behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from shardckpt.demo.messages import Event, Failed, Job, Listener, Started

POLL_S = 0.02
LAST_LINES = 15


class RanksFailedError(Exception):
    """The ranks ended with an error or ran past their deadline; says what they told of it, or the end of their logs."""


class Ranks:
    """The processes of one job: `torchrun`, and the ranks that it starts. To be used in a `with` statement.

    Called by the show, on its only thread. At the end of the block everything that is still running is killed.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._job = job
        self._folder = folder
        self._pids: list[int] = []
        self._failures: dict[str, list[int]] = {}
        self.killed = False
        self._deadline = time.monotonic() + job.deadline_s
        job.write(folder / "job.json")
        with (folder / "torchrun.log").open("wb") as log:
            self._torchrun = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,  # Ctrl-C reaches the show alone, which then ends the ranks in its own way
            )

    def _command(self) -> list[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        logs = ["--log-dir", str(self._folder / "logs"), "--redirects", "3"]
        ranks = ["--nproc-per-node", str(self._job.mesh.ranks)]
        return [*torchrun, *logs, *ranks, "-m", "shardckpt.demo.job", str(self._folder / "job.json")]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._torchrun.poll() is None:
            self.kill()

    def events(self) -> Iterator[Event]:
        """What the ranks tell, as it comes, until all have ended; or `RanksFailedError`."""
        listener = Listener(self._job.events)
        running = True
        while running:
            running = self._torchrun.poll() is None  # looked at first: what comes after it is the last of the events
            for event in listener.new_events():
                if isinstance(event, Started):
                    self._pids.append(event.pid)
                elif isinstance(event, Failed):
                    self._failures.setdefault(event.message, []).append(event.rank)
                yield event
            if self.killed:
                return
            if running:
                self._check_deadline()
                time.sleep(POLL_S)
        if self._torchrun.returncode != 0:
            raise RanksFailedError(self.explain(f"the ranks ended with exit status {self._torchrun.returncode}"))

    def kill(self) -> None:
        """SIGKILL to every rank at once, then wait for torchrun to notice and end."""
        self.killed = True
        for pid in self._pids:  # children of a torchrun that runs and has seen no failure yet: the numbers are theirs
            _kill(pid)
        if len(self._pids) < self._job.mesh.ranks:
            self._torchrun.terminate()  # it ends the ranks that have not told their number yet
        try:
            self._torchrun.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._torchrun.kill()
            self._torchrun.wait()

    def explain(self, what: str) -> str:
        """What has happened, and what the ranks said of it; if they said nothing, the last lines of their logs."""
        lines = [f"rank {', '.join(map(str, sorted(ranks)))}: {text}" for text, ranks in self._failures.items()]
        return "\n".join([what, *(lines or self._last_lines()), "(all that they wrote: run it again with --keep)"])

    def _last_lines(self) -> Iterator[str]:
        """The end of every log that is not empty, ranks first."""
        for log in [*sorted((self._folder / "logs").rglob("std*.log")), self._folder / "torchrun.log"]:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            if lines:
                yield f"--- {'torchrun' if log.name == 'torchrun.log' else f'rank {log.parent.name} {log.stem}'}"
                yield from lines[-LAST_LINES:]

    def _check_deadline(self) -> None:
        if time.monotonic() > self._deadline:
            self.kill()
            raise RanksFailedError(self.explain(f"the ranks were killed after {self._job.deadline_s:g} s (--deadline)"))


def _environment() -> dict[str, str]:
    """One thread per rank, this package importable from any folder, gloo on the loopback device where there is one."""
    environment = dict(os.environ)
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["OMP_NUM_THREADS"] = "1"
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed for deterministic matrix products on CUDA
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
