"""How long small files take at a place, and how fast large ones go there and come back. No torch."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

from shardckpt.storage.base import Read, RenamingStorage, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.tools.examining.findings import Finding, bytes_text

_ROUNDS = 3
_SMALL = 4096
_SLOW_S = 0.1
_EXAMPLE = 10e9


def latencies(storage: Storage, folder: str) -> Iterator[Finding]:
    """Of a small file, made durable, and of syncing a folder."""
    content = os.urandom(_SMALL)
    numbers = iter(range(100))
    seconds = _median(lambda: storage.put(f"{folder}/small-{next(numbers)}", [content]), rounds=5)
    what = f"{seconds * 1e3:.1f} ms until a small file is durable"
    advice = "a commit waits for at least three such in a row; many ranks write theirs at the same time"
    yield Finding("small file", "note" if seconds > _SLOW_S else "good", what, advice, seconds, "s")
    if isinstance(storage, RenamingStorage):
        seconds = _median(lambda: storage.sync_folder(folder), rounds=5)
        yield Finding("folder sync", "good", f"{seconds * 1e3:.1f} ms", "", seconds, "s")


def rates(storage: Storage, folder: str, *, nbytes: int) -> Iterator[Finding]:
    """Of one process and one file of so many random bytes, durable; read from the device where that can be arranged."""
    view = random_memory(nbytes)
    written, read = list[float](), list[float]()
    for number in range(_ROUNDS):
        key = f"{folder}/large-{number}"
        written.append(seconds_of(partial(storage.put, key, [view])))
        forget(storage, key)
        read.append(seconds_of(partial(storage.read_into, [Read(key, 0, view)])))
        storage.delete([key])
    for name, seconds in (("write", median(written)), ("read", median(read))):
        rate = nbytes / seconds
        what = f"{bytes_text(rate)}/s by one process (median of {_ROUNDS} x {bytes_text(nbytes)})"
        cost = f"{bytes_text(_EXAMPLE)} of state by one rank: about {_EXAMPLE / rate:.3g} s"
        yield Finding(f"rate of a {name}", "good", what, cost, rate, "B/s")


def random_memory(nbytes: int) -> memoryview:
    """So many bytes that do not compress, in memory of whole pages."""
    view = memoryview(mmap.mmap(-1, nbytes))
    for start in range(0, nbytes, 1 << 20):
        view[start : start + (1 << 20)] = os.urandom(min(1 << 20, nbytes - start))
    return view


def forget(storage: Storage, key: str) -> None:
    """Have the system drop what it keeps of a file in its page cache."""
    if isinstance(storage, LocalStorage):
        file = os.open(storage.path_of(key), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-9)


def _median(work: Callable[[], object], *, rounds: int) -> float:
    return median(seconds_of(work) for _ in range(rounds))
