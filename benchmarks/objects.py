"""`python -m benchmarks.objects`: save to and load from object storage, beside DCP and beside a bare client.

A server of its own on this machine (SeaweedFS, its data in the folder for temporary files: set TMPDIR to choose), one
process, state A. By turns in one process: ours (`CheckpointManager`, with each client), `dcp.save` and `dcp.load` with
`FsspecWriter` and `FsspecReader`, and the same number of bytes put and got by bare clients: s3fs as shipped, s3fs with
parts from several threads, obstore, and gets by what `client="direct"` is made of; each with several settings, of which
the best one counts. Then several ranks that hold one state alike (`benchmarks.several`): all write against one writes,
each byte read once against all read all.
What was loaded is compared with what was saved before any number counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

import shardckpt as sc
from benchmarks import several
from benchmarks.cells import Spread
from benchmarks.clients import Bare
from benchmarks.engines.dcp import Dcp
from benchmarks.limits import machine_facts
from benchmarks.places import Place
from benchmarks.rounds import wait_until_quiet
from benchmarks.states import Shape, State, make
from shardckpt.testing.servers import seaweed
from shardckpt.testing.servers.seaweed import ObjectServer

GOALS = {"dcp": 3.0, "bare": 0.85}
OURS = {"shardckpt": {}, "shardckpt, direct": {"client": "direct"}}
"""By name, `storage_options`; as shipped first."""


Client: TypeAlias = Callable[[str], object]
"""Puts or gets the object of that key."""


@dataclass
class Timings:
    """Seconds by name, in the order in which names came; and those of the processor, of all threads of this process."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    busy: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, work: Callable[[], object]) -> None:
        gc.collect()
        began, busy = time.perf_counter(), time.process_time()
        work()
        self.busy.setdefault(name, []).append(time.process_time() - busy)
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def spread(self, name: str) -> Spread:
        spread = Spread.of(self.seconds[name])
        assert spread is not None
        return spread

    def best(self, prefix: str) -> str:
        """The name that begins so with the smallest median."""
        return min(
            (name for name in self.seconds if name.startswith(prefix)), key=lambda name: self.spread(name).middle
        )


class Bench:
    """The turns; each saves to a place of its own and leaves it, for deleting would disturb the next."""

    def __init__(self, server: ObjectServer, state: State, only: Sequence[str] = ()) -> None:
        """`only`: how the names begin of the bare clients that count; all if there are none."""
        self.timings = Timings()
        self._state = state
        self._root = Place(f"{server.url}/{secrets.token_hex(4)}")
        self._bare = Bare(server, state.nbytes)
        self._key = f"standing-{secrets.token_hex(4)}"
        self._bare.puts()["put, s3fs, 8 MiB x 8"](self._key)
        self._puts, self._gets = chosen(self._bare.puts(), only), chosen(self._bare.gets(), only)
        # The environment says how to reach the server.
        self._managers = {
            name: sc.CheckpointManager(f"{self._root.url}/{number}", storage_options=options)
            for number, (name, options) in enumerate(OURS.items())
        }
        self._dcp = Dcp(state, self._root / "dcp", durable=True)
        for manager in self._managers.values():
            manager.save(0, state.live).result()  # its memory is touched once in the life of a job

    def round(self, number: int, patience_s: float) -> None:
        """Everything once, in another order than before."""
        turns: list[Callable[[int], None]] = [partial(self._ours, name) for name in self._managers]
        turns += [self._theirs]
        turns += [partial(self._put, name, put) for name, put in self._puts.items()]
        turns += [partial(self._get, name, get) for name, get in self._gets.items()]
        first = number * 3 % len(turns)
        for turn in turns[first:] + turns[:first]:
            wait_until_quiet(patience_s)
            turn(number)
        self._root.remove()

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()
        self._bare.close()

    def _ours(self, name: str, number: int) -> None:
        manager, state = self._managers[name], self._state.live

        def save(step: int) -> None:
            manager.save(step, state).result()

        def load(step: int) -> None:
            manager.load(step, state)

        self._save_and_load(name, number, save, load)

    def _theirs(self, number: int) -> None:
        self._save_and_load("dcp", number, self._dcp.save, self._dcp.load)

    def _save_and_load(
        self, name: str, number: int, save: Callable[[int], object], load: Callable[[int], object]
    ) -> None:
        self._state.fill(2 * number)
        digests = self._state.digests()
        self.timings.time(f"save, {name}", partial(save, number + 1))
        self._state.fill(2 * number + 1)
        self.timings.time(f"load, {name}", partial(load, number + 1))
        assert self._state.digests() == digests, f"{name} loaded something else than it saved"

    def _put(self, name: str, put: Callable[[str], object], number: int) -> None:
        key = f"bare-{secrets.token_hex(4)}"
        self.timings.time(name, partial(put, key))
        self._bare.remove(key)

    def _get(self, name: str, get: Callable[[str], object], number: int) -> None:
        self.timings.time(name, partial(get, self._key))


def chosen(clients: Mapping[str, Client], only: Sequence[str]) -> dict[str, Client]:
    """Those whose names begin so; `SystemExit` if there is none, for nothing could be held against it."""
    found = {name: client for name, client in clients.items() if not only or name.startswith(tuple(only))}
    if not found:
        raise SystemExit(f"--bare: begin with one of: {'; '.join(clients)}")
    return found


def told(timings: Timings, nbytes: int) -> str:
    """Markdown."""
    lines = ["| | s, median (range) | MB/s | processor s |", "| --- | ---: | ---: | ---: |"]
    for name in timings.seconds:
        spread, busy = timings.spread(name), Spread.of(timings.busy[name])
        assert busy is not None
        text = f"{spread.middle:.2f} ({spread.least:.2f}-{spread.most:.2f})"
        lines.append(f"| {name} | {text} | {nbytes / spread.middle / 1e6:.0f} | {busy.middle:.2f} |")
    lines += ["", "| times as fast as (range) | s3fs | direct | goal |", "| --- | ---: | ---: | ---: |"]
    for what, bare in (("save", "put"), ("load", "get")):
        best = timings.best(f"{bare},")
        for against, goal in ((f"{what}, dcp", GOALS["dcp"]), (best, GOALS["bare"])):
            ratios = [_times(timings.seconds, against, f"{what}, {name}") for name in OURS]
            lines.append(f"| {what}: {against} | {' | '.join(ratios)} | {goal:g} |")
        most = _times(timings.seconds, f"{what}, dcp", best)
        lines.append(f"| {what}, dcp: {best} | {most} | {most} | |")
    lines += [
        "",
        "| direct, against s3fs | times as fast (range) | times less processor (range) |",
        "| --- | ---: | ---: |",
    ]
    for what in ("save", "load"):
        pair = [f"{what}, {name}" for name in OURS]
        lines.append(f"| {what} | {_times(timings.seconds, *pair)} | {_times(timings.busy, *pair)} |")
    return "\n".join(lines)


def _times(found: Mapping[str, Sequence[float]], one: str, other: str) -> str:
    """By how many times the other took less, round by round."""
    ratio = Spread.of([long / short for long, short in zip(found[one], found[other], strict=True)])
    assert ratio is not None
    return f"{ratio.middle:.2f} ({ratio.least:.2f}-{ratio.most:.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.objects", description=__doc__)
    parser.add_argument("--gb", type=float, default=0.3, help="size of the state, in 10^9 bytes (default: 0.3)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--ranks", type=int, default=4, help="of the job with several processes (default: 4; 1: none)")
    parser.add_argument("--patience", type=float, default=0.0, metavar="S", help="wait so long for a quiet machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the seconds of every turn here")
    parser.add_argument("--bare", nargs="+", default=(), metavar="NAME", help="only bare clients whose names begin so")
    parser.add_argument("--tls", action="store_true", help="by https, with a certificate of its own")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    facts, nbytes = machine_facts(Path(tempfile.gettempdir())), int(options.gb * 1e9)
    together: dict[str, list[float]] = {}
    with seaweed.running(bucket="benchmark", tls=options.tls) as server:
        os.environ.update(server.environment)  # for FsspecWriter, whose URL alone says where, and for the ranks
        state = make(Shape("A", nbytes), rank=0, mesh=None)
        bench = Bench(server, state, options.bare)
        for number in range(options.rounds):
            bench.round(number, options.patience)
        bench.close()
        print(", ".join(f"{key}: {value}" for key, value in facts.items()))
        way = "by https" if options.tls else "by http"
        print(f"\nOne process, state A, {state.nbytes / 1e9:.2f} GB, {options.rounds} rounds, SeaweedFS {way}:\n")
        print(told(bench.timings, state.nbytes), flush=True)
        if options.ranks > 1:
            with tempfile.TemporaryDirectory(prefix="shardckpt-bench-") as folder:
                where = f"{server.url}/{secrets.token_hex(4)}"
                task = several.Task(where, nbytes, options.rounds, f"{folder}/result.json", options.patience)
                together = several.measure(task, options.ranks)
            print(several.render(together, nbytes, options.ranks))
    if options.json:
        found = {"machine": facts, "nbytes": nbytes, "rounds": options.rounds, "ranks": options.ranks}
        found |= {"one process": bench.timings.seconds, "processor": bench.timings.busy, "several ranks": together}
        options.json.write_text(json.dumps(found, indent=1, default=str))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
