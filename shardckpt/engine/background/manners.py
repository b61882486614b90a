"""How considerate the writing of checkpoints is of whatever else wants the device, the network and the processor."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

IoClass: TypeAlias = Literal["best-effort", "idle"]

_log = logging.getLogger(__name__)

_SYSCALLS = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273}
"""Number of `ioprio_set`, for which no libc has a function."""
_THREAD = 1
"""IOPRIO_WHO_PROCESS, which means one thread; 0 is the calling one."""
_CLASSES: dict[IoClass, int] = {"best-effort": 2 << 13 | 7, "idle": 3 << 13}
"""Class and, of "best-effort", the lowest of its levels."""
_NICEST = 19

_refused: set[str] = set()


@dataclass(frozen=True, slots=True)
class Manners:
    """How checkpoints are written beside the training; each rank may have its own. Nothing is set by default.

    What the system does not know or does not allow is logged once, and left out. Only checksums and writing are
    concerned, and never the copy of the state, for which training may have to wait.

    >>> Manners(rate=200e6, nice=10, io_class="idle")
    Manners(rate=200000000.0, nice=10, io_class='idle', process=False)
    """

    rate: float | None = None
    """At most so many bytes per second go out from this rank. A place that wants small objects in one piece gets them
    so, and waits before; a `RetryingStorage` does not repeat a put whose bytes are measured out. What
    `save_consolidated_fsdp_model` writes while training waits is not held up."""
    nice: int = 0
    """By how much the threads that write are nicer than the process (Linux)."""
    io_class: IoClass | None = None
    """`ionice` of these threads (Linux): after everybody else ("idle"), or the last of the usual ones ("best-effort").
    Schedulers of devices heed it where there are any (bfq, mq-deadline); what goes through the page cache is written
    by the kernel, which does not."""
    process: bool = False
    """Write in another process, which maps the image of the state. For a path or a URL, with `storage_options` of plain
    values. The process is this rank's own, and replaced when it dies. What has no such image is written by this one:
    with `staging="none"`, a consolidated model, and what is small (records, copies of `cc/`)."""

    def __post_init__(self) -> None:
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate is in bytes per second, more than 0; not {self.rate!r}")
        if not 0 <= self.nice <= _NICEST:
            raise ValueError(f"nice is 0 to {_NICEST}, not {self.nice!r}")
        if self.io_class is not None and self.io_class not in get_args(IoClass):
            raise ValueError(f"io_class is one of {', '.join(get_args(IoClass))}, not {self.io_class!r}")

    def behave(self) -> None:
        """Set this thread so, for the rest of its life: none can be made less nice again. Its children inherit it."""
        if self.nice:
            _try("nice", self._be_nice)
        if self.io_class is not None:
            _try("ionice", self._be_last)

    def _be_nice(self) -> None:
        if platform.system() != "Linux":
            raise OSError("threads have no niceness of their own here")
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + self.nice
        os.setpriority(os.PRIO_PROCESS, thread, min(_NICEST, niceness))

    def _be_last(self) -> None:
        assert self.io_class is not None
        number = _SYSCALLS.get(platform.machine()) if platform.system() == "Linux" else None
        if number is None:
            raise OSError("not known on this system")
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(number, _THREAD, 0, _CLASSES[self.io_class]) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def _try(what: str, act: Callable[[], None]) -> None:
    try:
        act()
    except OSError as error:
        if what not in _refused:
            _refused.add(what)
            _log.warning("%s of the threads that write checkpoints could not be set: %s", what, error)
