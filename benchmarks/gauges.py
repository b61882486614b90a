"""What a job reads off: the clock, the memory, the bytes that came from the device; and of all ranks together."""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def together() -> None:
    """Returns when all ranks have come here."""
    if world() > 1:
        dist.barrier()


def timed(work: Callable[[], None]) -> float:
    """Seconds until the slowest rank is done."""
    together()
    began = time.perf_counter()
    work()
    return slowest([time.perf_counter() - began])[0]


def slowest(seconds: list[float]) -> list[float]:
    """Of all ranks, place by place."""
    return _reduced(seconds, dist.ReduceOp.MAX)


def total(number: int) -> int:
    """Over all ranks."""
    return int(_reduced([float(number)], dist.ReduceOp.SUM)[0])


def everywhere(condition: bool) -> bool:
    """Whether it holds on all ranks."""
    return total(int(condition)) == world()


def of_all_ranks(value: Any) -> list[Any]:
    """Each rank's value, in order, on all."""
    if world() == 1:
        return [value]
    gathered: list[Any] = [None] * world()
    dist.all_gather_object(gathered, value)
    return gathered


def _reduced(numbers: list[float], how: Any) -> list[float]:
    tensor = torch.tensor(numbers, dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(tensor, how)
    reduced: list[float] = tensor.tolist()
    return reduced


@contextmanager
def peak_memory(before: int | None = None) -> Iterator[dict[str, int]]:
    """`peak`: the most bytes that this process and its children held beyond what it held before (or `before`).

    What a child shares with others or maps from files is left out, so that a copy in shared memory counts once. What
    this process maps from files counts while it is mapped, although the page cache could give it back at any time.
    """
    gc.collect()
    if before is None:
        forget_peak()
        before = status("self", "VmRSS")
    found: dict[str, int] = {}
    yield found
    own = [str(child) for child in _children()]
    beside = sum(status(child, "VmHWM") - status(child, "RssShmem") - status(child, "RssFile") for child in own)
    found["peak"] = status("self", "VmHWM") - before + beside


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: man 5 proc


def status(process: str, field: str) -> int:
    """Bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), 0)


def _children() -> list[int]:
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # that thread has ended meanwhile
            found += map(int, path.read_text().split())
    return found


def processor_s() -> float:
    """Processor time of this process and its children so far, those that have ended included; in steps of 10 ms."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 0
    for child in _children():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            after_name = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += int(after_name[11]) + int(after_name[12])  # utime and stime: man 5 proc
    return time.process_time() + ended.ru_utime + ended.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def device_bytes_read() -> int:
    """Bytes that this process has had read from block devices so far, be it by reading or by looking at a mapping."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def forget(path: Path) -> None:
    """Drop a synced file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def remember(path: Path) -> None:
    """Have a file in the page cache."""
    window = bytearray(8 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(window):
            pass


@contextmanager
def unsynced() -> Iterator[Callable[[], object]]:
    """Nothing that this process syncs is synced: what saving costs up to the page cache, the same for every engine.

    Gives what writes everything that lies there all the same.
    """
    kept = {name: getattr(os, name) for name in ("fsync", "fdatasync", "sync")}
    try:
        for name in kept:
            setattr(os, name, lambda *_: None)
        yield kept["sync"]
    finally:
        for name, call in kept.items():
            setattr(os, name, call)
