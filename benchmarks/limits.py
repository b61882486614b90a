"""What this machine is, and what it can do at most: the measure that every engine is held against.

One process, plain system calls, nothing of shardckpt; the bytes are random and lie in memory that has been touched.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import shardckpt as sc
from benchmarks.engines import sync
from benchmarks.gauges import forget
from benchmarks.places import Place

_PIECE = 16 << 20
DIRECT = getattr(os, "O_DIRECT", 0)

LIMITS = ("write cached", "write buffered", "write direct", "read warm", "read cold", "read cold direct", "copy",
          "copy 2 threads", "first touch")  # fmt: skip
"""What is measured of a folder, in bytes per second. "write cached" is not synced, the other writes are. "copy" is into
memory that is warm, "first touch" into fresh."""
REMOTE_LIMITS = ("put", "get", "copy", "copy 2 threads", "first touch")
"""What is measured of another place: objects of 16 MiB, eight at once."""
WRITE_LIMITS = ("write buffered", "write direct", "put")
"""Those that a durable save is held against."""
READ_LIMITS = {"load": ("read warm", "get"), "cold": ("read cold", "read cold direct")}
"""By measure, those that a load is held against."""


def measure_limits(place: Place, nbytes: int) -> dict[str, float]:
    """Bytes per second by name, each measured once with that many bytes; the place must exist."""
    nbytes = max(_PIECE, nbytes // _PIECE * _PIECE)
    source, target = (mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2))
    _randomise(source)
    fresh = _seconds(lambda: _copy(source, target, threads=1))
    seconds = {
        "first touch": fresh,
        "copy": _seconds(lambda: _copy(source, target, threads=1)),
        "copy 2 threads": _seconds(lambda: _copy(source, target, threads=2)),
    }
    seconds |= _measure_files(place.path, source, target) if place.is_local else _measure_objects(place, source)
    return {name: nbytes / seconds[name] for name in (LIMITS if place.is_local else REMOTE_LIMITS)}


def _measure_files(folder: Path, source: mmap.mmap, target: mmap.mmap) -> dict[str, float]:
    path, seconds = folder / "limit", {}
    for name, flags in (("write cached", 0), ("write buffered", 0), ("write direct", DIRECT)):
        synced = name != "write cached"
        seconds[name] = _seconds(lambda flags=flags, synced=synced: write_file(path, source, flags, synced=synced))  # type: ignore[misc]
        if name == "write buffered":
            seconds |= _measure_reads(path, target)
        path.unlink()
        sync(folder)
    return seconds


def _measure_reads(path: Path, target: mmap.mmap) -> dict[str, float]:
    warm = _seconds(lambda: read_file(path, target, threads=2))
    forget(path)
    cold = _seconds(lambda: read_file(path, target, threads=1))
    forget(path)
    direct = _seconds(lambda: read_file(path, target, threads=4, flags=DIRECT))
    return {"read warm": warm, "read cold": cold, "read cold direct": direct}


def _measure_objects(place: Place, source: mmap.mmap) -> dict[str, float]:
    fs, path = place.file_system()
    names = [f"{path}/limit.{at}" for at in range(0, len(source), _PIECE)]
    pieces = [bytes(source[at : at + _PIECE]) for at in range(0, len(source), _PIECE)]
    with ThreadPoolExecutor(8) as pool:
        put = _seconds(lambda: list(pool.map(fs.pipe_file, names, pieces)))
        get = _seconds(lambda: list(pool.map(fs.cat_file, names)))
        list(pool.map(fs.rm_file, names))
    return {"put": put, "get": get}


def machine_facts(root: Path | Place) -> dict[str, Any]:
    """What a reader must know to compare: none of it names the machine."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "file system": _file_system(root),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shardckpt": _revision(),
    }


def write_file(path: Path, source: mmap.mmap, flags: int, *, synced: bool) -> None:
    """Preallocated, pieces of 16 MiB, on four threads past the page cache or two through it; synced with its folder."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o644)
    try:
        os.posix_fallocate(file, 0, len(source))
        _each_piece(source, lambda at, piece: os.pwrite(file, piece, at), threads=4 if flags else 2)
        if synced:
            os.fsync(file)
    finally:
        os.close(file)
    if synced:
        sync(path.parent)


def read_file(path: Path, target: mmap.mmap, *, threads: int, flags: int = 0) -> None:
    """All of it, in pieces of 16 MiB, through the page cache or (`DIRECT`) past it."""
    file = os.open(path, os.O_RDONLY | flags)
    try:
        _each_piece(target, lambda at, piece: os.preadv(file, [piece], at), threads=threads)
    finally:
        os.close(file)


def _copy(source: mmap.mmap, target: mmap.mmap, *, threads: int) -> None:
    """By memcpy, which is what torch does for a contiguous tensor."""
    start, end = (ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in (source, target))

    def copy(at: int, piece: memoryview) -> int:
        ctypes.memmove(end + at, start + at, len(piece))  # lets other threads run meanwhile
        return len(piece)

    _each_piece(source, copy, threads=threads)


def _each_piece(memory: mmap.mmap, work: Callable[[int, memoryview], int], *, threads: int) -> None:
    view = memoryview(memory)

    def one(at: int) -> None:
        done = work(at, view[at : at + _PIECE])
        if done != len(view[at : at + _PIECE]):
            raise OSError(f"only {done} bytes of a piece were transferred; is the disk full?")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(0, len(view), _PIECE)))


def _randomise(memory: mmap.mmap) -> None:
    noise = random.Random(1).randbytes(_PIECE)
    for at in range(0, len(memory), _PIECE):
        memory[at : at + _PIECE] = noise


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _revision() -> str:
    """The commit of the source tree that is measured, or the version if it is none."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or str(sc.__version__)


def _first(path: str, field: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)


def _file_system(root: Path | Place) -> str:
    """The type of the mount that the root lies on, the one with the longest path above it; or the protocol."""
    if isinstance(root, Place):
        if not root.is_local:
            return root.url.partition("://")[0]
        root = root.path
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    above = [(len(point), kind) for point, kind in mounts if root.is_relative_to(point)]
    return max(above, default=(0, "unknown"))[1]
