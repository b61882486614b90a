"""What a test may not leave behind: threads, open files, child processes, shared memory. `conftest.py` checks it.

Some things are made at first use and then stay for the life of the process, whoever used them first: those are listed
here and are nobody's leak. Everything else must be gone a few seconds after the test; what must not, is declared by
the test: `@pytest.mark.leaks(threads=("prefix of the name",), files=("prefix of the target",), why="...")`.
"""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PATIENCE_S = 5.0
"""How long what is about to end may take to do so."""

LASTING_THREADS = (
    "fsspecIO",  # the one event loop of all asynchronous file systems
    "asyncio_",  # that loop's executor, for name resolution
)
LASTING_FILES = (
    "/dev/",  # null, urandom, nvidia*
    "/proc/",
    "/sys/",
    "/var/lib/libuuid/",  # where there is such a folder, libuuid keeps the clock of `uuid.uuid1` open for good
)
LOOP_FILES = ("socket:", "anon_inode:[eventpoll]")
"""Belong to fsspec's event loop while that runs: its wake-up sockets, and connections kept for the next request."""
SERVERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
"""Processes that `multiprocessing` keeps for its own use until the end."""
SHARED_MEMORY = Path("/dev/shm")
_PROCESSES = range(1, 1 << 22)
"""Ids that processes can have (PID_MAX_LIMIT of Linux); what else looks like a number in a name is part of a word."""
TOLD = Path("/proc/thread-self/children").is_file()
"""Whether the kernel tells what a thread has started."""


@dataclass(frozen=True)
class Held:
    """What this process holds at one moment."""

    threads: frozenset[threading.Thread]
    files: frozenset[tuple[int, str]]
    """Descriptor and what it is: a path, or "socket:[123]"."""
    processes: frozenset[int]
    shared_memory: frozenset[str]


def held(*, without: Collection[int] = ()) -> Held:
    """What is held now, except for the file descriptors in `without`."""
    return Held(
        frozenset(threading.enumerate()),
        frozenset(file for file in _open_files() if file[0] not in without),
        frozenset(_children()),
        frozenset(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else frozenset(),
    )


def leaks(
    before: Held, *, without: Collection[int] = (), threads: tuple[str, ...] = (), files: tuple[str, ...] = ()
) -> list[str]:
    """What has come since `before` and does not go, each with its name; waits for it to go, `PATIENCE_S` at most."""
    deadline = time.monotonic() + PATIENCE_S
    while found := _new(before, held(without=without), threads=threads, files=files):
        if time.monotonic() > deadline:
            break
        gc.collect()
        for thread in threading.enumerate():
            if thread not in before.threads and not thread.name.startswith(LASTING_THREADS + threads):
                thread.join(0.05)
        threading.Event().wait(0.01)
    return found


def _new(before: Held, now: Held, *, threads: tuple[str, ...], files: tuple[str, ...]) -> list[str]:
    lasting_files = LASTING_FILES + files
    if any(thread.name == "fsspecIO" for thread in now.threads):
        lasting_files += LOOP_FILES
    new_threads = [t.name for t in now.threads - before.threads if t.is_alive()]
    return [
        *(f"thread {name!r}" for name in new_threads if not name.startswith(LASTING_THREADS + threads)),
        *(f"file {fd}: {target}" for fd, target in now.files - before.files if not target.startswith(lasting_files)),
        *(f"process {pid}: {_command(pid)}" for pid in now.processes - before.processes),
        *(f"shared memory {name}" for name in _ours(now.shared_memory - before.shared_memory)),
    ]


def _open_files() -> Iterable[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        try:
            yield int(name), os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue


def _children() -> Iterable[int]:
    """All that live below this process, but for the servers and what these have started; asked twice for every test."""
    found = list(_children_of(str(os.getpid())))
    while found:
        pid = str(found.pop())
        if not any(server in _words(pid) for server in SERVERS):
            if _words(pid):  # none: a zombie, or it has ended since
                yield int(pid)
            found += _children_of(pid)


def _children_of(pid: str) -> Iterable[int]:
    """What its threads have started, as Linux tells it: without a look at every process of the machine."""
    with suppress(OSError, psutil.NoSuchProcess):
        if not TOLD:
            yield from (child.pid for child in psutil.Process(int(pid)).children())
            return
        for task in Path("/proc", pid, "task").iterdir():
            with suppress(OSError):
                yield from map(int, (task / "children").read_text().split())


def _words(pid: str) -> str:
    """Its command line; empty if it has none, or none any more."""
    try:
        return Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return "(has ended since)"


def _ours(names: Collection[str]) -> Iterable[str]:
    """Those that name a process of this test run; other programs, and other workers of xdist, make their own."""
    if not names:
        return
    mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    for name in names:
        numbers = {int(number) for number in re.findall(r"\d+", name) if int(number) in _PROCESSES}
        if numbers & mine or not any(psutil.pid_exists(number) for number in numbers):
            yield name
