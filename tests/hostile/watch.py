"""Watches a process while it reads what others wrote: nothing runs, nothing outside is touched, memory stays level.

Python tells an audit hook of every open, import, process, socket and call of `os`, before it is done. Hooks cannot be
taken away again, so there is one for the whole process, and it looks only while a `Watch` is open.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOM = 2 << 30
"""Bytes of address space that may come to what there is: what asks for more gets a `MemoryError`, not the machine."""

_EVENTS = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "urllib.",
    "ftplib.",
    "smtplib.",
    "webbrowser.",
    "pickle.",
    "pty.",
    "winreg.",
    "tempfile.",
    "glob.",
    "marshal.",
    "sqlite3.",
    "code.",
)
_SINGLE = frozenset(("open", "import", "exec", "builtins.input"))
_HARMLESS = frozenset(("os.listdir", "os.scandir"))  # judged by their path, like `open`


class Watch:
    """What was noticed while it was open; paths below `inside` may be opened, looked at, and nothing else."""

    def __init__(self, inside: str = "") -> None:
        self.noticed: list[str] = []
        self._inside = f"{os.path.realpath(inside)}/" if inside else ""
        self.ran = False
        """Set by `canary`, which hostile pickles call by its name."""

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import" and arguments[0] in sys.modules:
            return
        if event == "open" or event in _HARMLESS:
            path = arguments[0]
            if isinstance(path, int) or self._is_inside(os.fsdecode(path)) or _is_source(arguments):
                return
        self.noticed.append(f"{event}{tuple(str(argument)[:80] for argument in arguments[:2])}")

    def _is_inside(self, path: str) -> bool:
        if "/" not in path:  # relative to a folder that was opened before
            return bool(self._inside) and path not in ("..", "")
        return bool(self._inside) and f"{os.path.abspath(path)}/".startswith(self._inside)


def _is_source(arguments: tuple[Any, ...]) -> bool:
    """Whether it is a module that has been imported, which is opened again for the lines of a traceback."""
    return arguments[1] == "r" and any(arguments[0] == getattr(m, "__file__", "") for m in [*sys.modules.values()])


_open: list[Watch] = []
_installed = threading.Event()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _open and (event in _SINGLE or event.startswith(_EVENTS)):
        _open[-1].hear(event, arguments)


def canary(*arguments: object) -> str:
    """What hostile files try to have called."""
    for watch in _open:
        watch.ran = True
    return "sung"


@contextmanager
def watching(inside: str | Path = "") -> Iterator[Watch]:
    """Look at this process, all its threads, until the end of the block. The caller judges what was noticed."""
    if not _installed.is_set():
        sys.addaudithook(_hook)
        _installed.set()
    watch = Watch(str(inside))
    _open.append(watch)
    try:
        yield watch
    finally:
        _open.remove(watch)


@contextmanager
def bounded_memory() -> Iterator[Callable[[], int]]:
    """A limit to the address space; gives a function that says by how many bytes resident memory has ever grown."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = _peak()
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    try:
        yield lambda: _peak() - before
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
