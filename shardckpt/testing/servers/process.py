"""Servers of other makers, in processes of their own, on free ports of this machine; none outlives its user."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_STARTING_S = 60.0
_ENDING_S = 10.0
_TRIES = 3
"""Ports that were free a moment ago may be taken."""
_POLL_S = 0.02


class ServerError(OSError):
    """The server did not start; the message has the end of its log."""


@contextmanager
def started(start: Callable[[Path], AbstractContextManager[T]]) -> Iterator[T]:
    """What `start` gives for an empty folder, which goes with it; begun anew if a port was taken in the meantime."""
    for left in reversed(range(_TRIES)):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardckpt-server-")))
            try:
                server = stack.enter_context(start(folder))
            except ServerError:
                if left:
                    continue
                raise
            yield server
        return


@contextmanager
def process(command: Sequence[str], folder: Path, *, name: str, environment: Mapping[str, str]) -> Iterator[Server]:
    """Run a server in `folder` until the block ends, and kill it then: its data goes with the folder.

    Called in the main thread of one process: the server dies with the thread that has started it, where the system
    has `setpriv`. It sees nothing of this process's environment.
    """
    log = folder / "log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*_dying_with_us(), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={"HOME": str(folder), "PATH": "/usr/bin:/bin", **environment},
            start_new_session=True,  # Ctrl-C is for whoever uses the server: it is still needed then
        )
    try:
        yield Server(child, log, name)
    finally:
        child.kill()
        child.wait(_ENDING_S)


class Server:
    """A process that is starting or running."""

    def __init__(self, child: subprocess.Popen[bytes], log: Path, name: str) -> None:
        self._child, self._log, self._name = child, log, name

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """`ServerError` if it ends before it is ready, or takes too long."""
        deadline = time.monotonic() + _STARTING_S
        while not ready():
            if self._child.poll() is not None or time.monotonic() > deadline:
                end, status = self._log.read_text(errors="replace")[-2000:], self._child.poll()
                raise ServerError(f"{self._name} did not start (exit status {status}); the end of its log:\n{end}")
            threading.Event().wait(_POLL_S)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def status_of(port: int, path: str) -> int | None:
    """What a GET of `path` is answered; None if nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _dying_with_us() -> list[str]:
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []
