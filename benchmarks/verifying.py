"""`python -m benchmarks.verifying`: `verify` beside bare reads of the same files, by turns, cold and warm.

The step is of one process, in two files. Cold: the files have been put out of the page cache; the limit is the better
of two bare reads, in pieces of 16 MiB, by one thread through the cache and by four threads past it. Warm, from the page
cache: two threads. Nothing is done with what is read.
"""

from __future__ import annotations

import argparse
import mmap
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

import shardckpt as sc
from benchmarks.cells import Spread
from benchmarks.cells import seconds as spread
from benchmarks.gauges import forget, remember
from benchmarks.limits import DIRECT, machine_facts, read_file
from benchmarks.rounds import wait_until_quiet

WAYS = ("bare, buffered", "bare, past the cache", "verify, cold", "bare, warm", "verify, warm")
GOAL = 0.85


def main(argv: Sequence[str] | None = None) -> int:
    """0 if the median of the ratios of the cold turns reaches the goal, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verifying", description=__doc__)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the step, in 10^9 bytes (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default: 7)")
    parser.add_argument("--root", type=Path, help="a folder on the disk to measure (default: where temporary files go)")
    parser.add_argument("--patience", type=float, default=0.0, metavar="MINUTES",
                        help="how long a round waits at most until others leave the processors alone")  # fmt: skip
    given = parser.parse_args(argv)
    root = given.root or Path(tempfile.gettempdir())
    print(", ".join(f"{key}: {value}" for key, value in machine_facts(root).items()))
    with tempfile.TemporaryDirectory(prefix="verifying-", dir=root) as name:
        files = prepare(Path(name), round(given.gb * 1e9))
        nbytes, rounds = sum(map(_size, files)), []
        for _ in range(given.rounds):
            wait_until_quiet(given.patience * 60)
            rounds.append(one_round(Path(name), files))
    print(render(nbytes, rounds))
    return 0 if ratio(rounds, "verify, cold") >= GOAL else 1


def prepare(folder: Path, nbytes: int) -> list[Path]:
    """Save the step; its files."""
    half = max(nbytes // 8, 1)
    with sc.CheckpointManager(folder) as checkpoints:
        state = {"model": {"w": torch.randn(half)}, "optimizer": {"m": torch.randn(half)}}
        checkpoints.save(1, state).result()
    return sorted((folder / "step_1").glob("*.pt"))


def one_round(folder: Path, files: Sequence[Path]) -> dict[str, float]:
    """Seconds of each way."""
    targets = {path: mmap.mmap(-1, _size(path) // mmap.PAGESIZE * mmap.PAGESIZE) for path in files}

    def bare(threads: int, flags: int = 0) -> None:
        for path, target in targets.items():
            read_file(path, target, threads=threads, flags=flags)

    def verify() -> None:
        assert sc.verify(folder).ok

    bare(1)  # so that the memory has been touched
    acts: dict[str, Callable[[], None]] = {
        "bare, buffered": lambda: bare(1),
        "bare, past the cache": lambda: bare(4, DIRECT),
        "verify, cold": verify,
        "bare, warm": lambda: bare(2),
        "verify, warm": verify,
    }
    seconds = {}
    for way, act in acts.items():
        for path in files:
            (remember if way.endswith("warm") else forget)(path)
        began = time.perf_counter()
        act()
        seconds[way] = time.perf_counter() - began
    return seconds


def ratio(rounds: Sequence[dict[str, float]], way: str) -> float:
    """Of the rate of the limit: the median over the rounds, each held against its own."""
    return median(_limit(seconds, way) / seconds[way] for seconds in rounds)


def _limit(seconds: dict[str, float], way: str) -> float:
    if way.endswith("warm"):
        return seconds["bare, warm"]
    return min(seconds["bare, buffered"], seconds["bare, past the cache"])


def render(nbytes: int, rounds: Sequence[dict[str, float]]) -> str:
    """A table of Markdown."""
    lines = [f"{nbytes / 1e9:.2f} GB, {len(rounds)} rounds", "", "| | GB/s | of the limit |", "| --- | ---: | ---: |"]
    for way in WAYS:
        rates = Spread.of(nbytes / 1e9 / seconds[way] for seconds in rounds)
        part = f"{ratio(rounds, way):.2f}" if way.startswith("verify") else ""
        lines.append(f"| {way} | {spread(rates)} | {part} |")
    return "\n".join(lines)


def _size(path: Path) -> int:
    return path.stat().st_size


if __name__ == "__main__":
    sys.exit(main())
