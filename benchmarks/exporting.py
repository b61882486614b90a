"""`python -m benchmarks.exporting`: a sharded step as one file, beside copying the same bytes, and DCP's own ways.

The step is of two tensor-parallel ranks, half of whose tensors are cut by rows and half by columns. By turns, each in a
process of its own (or one for each rank), whose memory is looked at every 5 ms: its files copied one by one, by a loop
that reads and writes blocks, and by `cp`; `sc.export` as safetensors and as `.pt`, by one process and by two;
`consolidate_safetensors_files` and `dcp_to_torch_save` of what DCP makes of the same tensors. All durable (fsync of
files and folder). What is read lies in the page cache, or, with --cold, none of it. What the first round has made is
compared, tensor by tensor, before any number counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

import shardckpt as sc
from benchmarks.cells import Spread
from benchmarks.exportways import RANKS, WAYS, clear, compare, make_ready, prepare
from benchmarks.limits import machine_facts
from benchmarks.rounds import wait_until_quiet
from shardckpt.testing.servers.process import free_ports

_WIDTH = 4096
_DEADLINE_S = 1800.0
_TIMEOUT = timedelta(minutes=20)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exporting", description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the model, in 10^9 bytes (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY",
                        help=f"some of: {'; '.join(WAYS)} (default: all)")  # fmt: skip
    parser.add_argument("--cold", action="store_true", help="what is read is not in the page cache")
    parser.add_argument("--width", type=int, default=_WIDTH, help=f"of the square tensors (default: {_WIDTH})")
    parser.add_argument("--root", type=Path, help="a folder on the disk to measure (default: where temporary files go)")
    parser.add_argument("--patience", type=float, default=0.0, metavar="MINUTES",
                        help="how long a turn waits at most until others leave the processors alone")  # fmt: skip
    parser.add_argument("--turn", nargs=3, metavar=("WAY", "FOLDER", "TO"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.turn:
        way, folder, to = given.turn
        told = _measured(way, Path(folder), Path(to))
        if told:
            print(json.dumps(told))
        return 0
    root = given.root or Path(tempfile.gettempdir())
    print(", ".join(f"{key}: {value}" for key, value in machine_facts(root).items()))
    with tempfile.TemporaryDirectory(prefix="exporting-", dir=root) as name:
        folder, to = Path(name), Path(name) / "out"
        nbytes = prepare(folder, round(given.gb * 1e9), given.width)
        turns: dict[str, list[dict[str, float]]] = {way: [] for way in given.ways}
        for number in range(given.rounds):
            for way in given.ways:
                make_ready(folder, WAYS[way], cold=given.cold)
                wait_until_quiet(given.patience * 60)
                turns[way].append(_turn(way, folder, to))
                if number == 0 and way not in ("copy", "cp"):
                    compare(folder, to)
                clear(to)
        print(render(nbytes, turns, cold=given.cold))
    return 0


def _turn(way: str, folder: Path, to: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.exporting", "--turn", way, str(folder), str(to)]
    ranks, (port,) = WAYS[way].ranks, free_ports(1)
    # Here, as in torchrun: it must outlive all ranks.
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if ranks > 1 else None  # type: ignore[attr-defined]
    job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    job |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **job, "RANK": str(rank)})
        for rank in range(ranks)
    ]
    try:
        told = [process.communicate(timeout=_DEADLINE_S)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
        del store
    for process in running:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    found: dict[str, float] = json.loads(told[0].splitlines()[-1])
    return found


def _measured(way: str, folder: Path, to: Path) -> dict[str, float] | None:
    """Seconds until the last rank has done it, and the most memory of its own that a rank held beyond what its process
    had before, in bytes; on rank 0."""
    gangs = sc.Gangs.from_env()
    gangs.root.enter("begin", timeout=_TIMEOUT)
    done, most, before = threading.Event(), [0], _own_memory()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], _own_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.perf_counter()
    try:
        WAYS[way].act(folder, to, gangs)
    finally:
        done.set()
        watching.join()
    told = gangs.root.gather([time.perf_counter() - began, max(most[0] - before, 0)], timeout=_TIMEOUT)
    gangs.close()
    if told is None:
        return None
    each: list[list[float]] = told  # type: ignore[assignment]
    return {"seconds": max(seconds for seconds, _ in each), "peak": max(peak for _, peak in each)}


def _own_memory() -> int:
    """Bytes that the process holds, without the pages of files that it has mapped, which are the page cache's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


def render(nbytes: int, turns: dict[str, list[dict[str, float]]], *, cold: bool = False) -> str:
    """Markdown: seconds (the middle turn, and the range), against the first way, and memory."""
    first = next(iter(turns))
    read = "read from the disk" if cold else "read from the page cache"
    lines = [
        f"\n{nbytes / 1e9:.2f} GB of tensors, step of {RANKS} ranks, {read}; {len(turns[first])} rounds\n",
        f"| | seconds | against {first} | peak memory of a rank, MiB |",
        "| --- | ---: | ---: | ---: |",
    ]
    spreads = {way: Spread.of(turn["seconds"] for turn in those) for way, those in turns.items()}
    against = spreads[first]
    for way, seconds in spreads.items():
        assert seconds is not None
        assert against is not None
        text = f"{seconds.middle:.2f} ({seconds.least:.2f} to {seconds.most:.2f})"
        peak = max(turn["peak"] for turn in turns[way]) / 2**20
        lines.append(f"| {way} | {text} | {seconds.middle / against.middle:.2f} | {peak:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
