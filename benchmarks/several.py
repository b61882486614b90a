"""Several ranks and one object store: what it gains that all write, and that each byte is read once. For
`benchmarks.objects`, which starts the ranks by torchrun and the server beside them.

The ranks hold one state alike, as in a DDP job. By turns in the same processes: a save in which all ranks put parts of
the one file, and one in which a single rank puts it; a load in which each rank fetches a share and passes it on, and
one in which each fetches everything. What was loaded is compared before any number counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist

import shardckpt as sc
from benchmarks.cells import Spread
from benchmarks.processes import environment, wait_until_quiet
from shardckpt.engine.loading.once.exchange import is_worth_while
from shardckpt.gang.wire.ending import leave
from shardckpt.storage import open_storage
from shardckpt.storage.base import Storage

T = TypeVar("T")

PAIRS = (
    ("save, all ranks put parts", "save, one rank puts all"),
    ("load, read once", "load, each rank reads all"),
)
_TENSORS = 64
_DEADLINE_S = 1800.0


@dataclass(frozen=True, slots=True)
class Task:
    """What the ranks do; travels as JSON."""

    url: str
    nbytes: int
    rounds: int
    result: str
    patience_s: float


def measure(task: Task, ranks: int) -> dict[str, list[float]]:
    """Seconds by name, one for each round. The server's credentials are in the environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "benchmarks.several", json.dumps(asdict(task))]
    subprocess.run(command, env=environment(), check=True, timeout=_DEADLINE_S, stdout=sys.stderr)
    found: dict[str, list[float]] = json.loads(Path(task.result).read_text())
    return found


def render(seconds: dict[str, list[float]], nbytes: int, ranks: int) -> str:
    """Markdown."""
    lines = [
        f"\n{ranks} ranks that hold {nbytes / 1e9:.2f} GB alike:\n",
        "| | s, median (range) | as fast as the other way |",
        "| --- | ---: | ---: |",
    ]
    for ours, other in PAIRS:
        ratio = Spread.of(b / a for a, b in zip(seconds[ours], seconds[other], strict=True))
        lines.append(f"| {ours} | {_cell(Spread.of(seconds[ours]))} | {_cell(ratio)} x |")
        lines.append(f"| {other} | {_cell(Spread.of(seconds[other]))} | |")
    return "\n".join(lines)


def _cell(spread: Spread | None) -> str:
    assert spread is not None
    return f"{spread.middle:.2f} ({spread.least:.2f}-{spread.most:.2f})"


class OneWriter:
    """A storage that does not say that several can put one object together."""

    def __init__(self, inner: Storage) -> None:
        self.url = inner.url
        for name in ("put", "replace", "read", "read_into", "size", "list", "delete", "delete_tree", "close"):
            setattr(self, name, getattr(inner, name))


def state_of(seed: int, nbytes: int) -> dict[str, torch.Tensor]:
    """Random bits, alike on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, nbytes // _TENSORS // 4)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (_TENSORS, count), dtype=torch.int32, generator=generator)
    return {str(number): row for number, row in enumerate(words)}


class Turns:
    """What every rank does, by turns."""

    def __init__(self, task: Task, storage: Any, gangs: sc.Gangs) -> None:
        self._task = task
        self._storage = storage
        self._saving = {
            PAIRS[0][0]: sc.CheckpointManager(storage, gangs),
            PAIRS[0][1]: sc.CheckpointManager(OneWriter(storage), gangs),  # type: ignore[arg-type]
        }
        self.seconds: dict[str, list[float]] = {name: [] for pair in PAIRS for name in pair}
        for step, manager in enumerate(self._saving.values()):
            manager.save(step, {"model": state_of(0, task.nbytes)}).result()  # memory is touched once in a job's life

    def round(self, number: int) -> None:
        """Everything once, the other way round each time."""
        state = state_of(number, self._task.nbytes)
        steps = dict(zip(self._saving, (2 * number, 2 * number + 1), strict=True))
        for name, step in _turned(list(steps.items()), number):
            self._time(name, partial(self._save, name, step, state))
        for name in _turned(list(PAIRS[1]), number):
            loaded = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
            # There is no option to read everything on every rank: nobody should want it.
            once = is_worth_while if name == PAIRS[1][0] else _never
            with mock.patch("shardckpt.engine.load.is_worth_while", once):
                self._time(name, partial(self._saving[PAIRS[0][0]].load, steps[PAIRS[0][0]], {"model": loaded}))
            assert all(torch.equal(loaded[key], state[key]) for key in state), f"{name}: it is not what was saved"
        dist.barrier()
        if dist.get_rank() == 0:
            for step in steps.values():
                self._storage.delete_tree(f"step_{step}")

    def _save(self, name: str, step: int, state: dict[str, torch.Tensor]) -> None:
        self._saving[name].save(step, {"model": state}).result()

    def close(self) -> None:
        for manager in self._saving.values():
            manager.close()

    def _time(self, name: str, work: Callable[[], object]) -> None:
        """Until the slowest rank is done."""
        if dist.get_rank() == 0:
            wait_until_quiet(self._task.patience_s)
        dist.barrier()
        began = time.perf_counter()
        work()
        dist.barrier()
        self.seconds[name].append(time.perf_counter() - began)


def _never(*_: object) -> bool:
    return False


def _turned(turns: list[T], number: int) -> list[T]:
    return turns if number % 2 else turns[::-1]


def main(argument: str) -> None:
    """On every rank."""
    task = Task(**json.loads(argument))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        turns = Turns(task, open_storage(task.url), sc.Gangs.from_env())
        for number in range(1, task.rounds + 1):
            turns.round(number)
        turns.close()
        if dist.get_rank() == 0:
            Path(task.result).write_text(json.dumps(turns.seconds))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
