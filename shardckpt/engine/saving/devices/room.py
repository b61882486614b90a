"""How much memory may be page-locked, and on which processors the thread that first touches it should run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_SYS = Path("/sys")
_PROC = Path("/proc")


def lockable_nbytes(ranks_here: int, *, sys: Path = _SYS, proc: Path = _PROC) -> int:
    """Bytes that one of so many ranks of this machine may page-lock: its share of half of what is free.

    The other half is for the page cache, data loaders and whatever grows later: what is locked can be neither swapped
    nor given to others, and a machine without memory kills processes. A limit of the container counts as well.
    """
    free = _available(proc)
    limit = _number(sys / "fs/cgroup/memory.max")
    if limit is not None:
        free = min(free, max(0, limit - (_number(sys / "fs/cgroup/memory.current") or 0)))
    return free // 2 // max(1, ranks_here)


def _available(proc: Path) -> int:
    with suppress(OSError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0


def _number(path: Path) -> int | None:
    """None where there is none, or no limit ("max")."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def processors_near(address: str, *, sys: Path = _SYS) -> frozenset[int]:
    """The processors of the NUMA node of a PCI device ("0000:3b:00.0"); none if the machine does not say."""
    node = _number(sys / "bus/pci/devices" / address / "numa_node")
    if node is None or node < 0:  # -1: there is only one
        return frozenset()
    with suppress(OSError, ValueError):
        return _listed((sys / f"devices/system/node/node{node}/cpulist").read_text())
    return frozenset()


def _listed(text: str) -> frozenset[int]:
    """Of "0-3,8,10-11"."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def apart(act: Callable[[], T], *, processors: Collection[int] = ()) -> T:
    """The result of `act`, done by a thread of its own, on those of these processors that this process may use.

    A page of memory lies at the NUMA node of the thread that touches it first, and page-locking touches all. The thread
    ends with what it was bound to; and an error that CUDA keeps for the thread that met it, and would report at
    whatever this thread launches next, ends with it, too.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with suppress(OSError, AttributeError):  # a wish, and not on every system
                near = os.sched_getaffinity(0) & frozenset(processors)
                if near:
                    os.sched_setaffinity(0, near)  # 0: of this thread alone
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="shardckpt-lock", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
