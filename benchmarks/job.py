"""One freshly started process, or one under torchrun: makes the state, measures one thing of one engine, and ends.

Started by `benchmarks.rounds` as `python -m benchmarks.job TASK.json`. Every rank does the same; the times are those
of the slowest rank, the bytes are those of all together. Nothing is reported before what was saved has been loaded
and compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks.engines import ENGINES, Engine
from benchmarks.gauges import rank, together, total, world
from benchmarks.limits import measure_limits
from benchmarks.loop import measure_loop
from benchmarks.measures import MEASURES, WrongContentError
from benchmarks.places import Place
from benchmarks.states import Shape, State, make
from shardckpt.gang.wire.ending import leave

__all__ = ["Task", "WrongContentError", "main", "measure"]

Values: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """What one job is to do; travels as a JSON file."""

    measure: str
    """"limits", "loop", or a name of `benchmarks.measures`."""
    engine: str
    shape: Shape
    url: str
    """Where the engine saves; "load", "cold" and "reshard" find there what "save" has left."""
    saves: int
    """How many saves, the first of which is told apart."""
    steps: int = 40
    """Of the training loop of "loop"."""

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Task:
        content = json.loads(text)
        return cls(**{**content, "shape": Shape(**content["shape"])})


def main(path: Path) -> None:
    """Do the task and write `result.json` beside it."""
    task = Task.decode(path.read_text())
    if world() > 1:
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world(),)) if world() > 1 else None
    try:
        values = _limits(task) if task.measure == "limits" else measure(task, mesh)
        if rank() == 0:
            path.with_name("result.json").write_text(json.dumps(values))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _limits(task: Task) -> Values:
    """Of the machine: by one process whatever the number of ranks."""
    values = measure_limits(Place(task.url), task.shape.nbytes) if rank() == 0 else {}
    together()
    return dict(values)


def measure(task: Task, mesh: DeviceMesh | None) -> Values:
    """Everything but "limits". `WrongContentError` on every rank if what was loaded is not what was saved."""
    state = make(task.shape, rank=rank(), mesh=mesh)
    with _engine(task, state) as engine:
        if task.measure == "loop":
            values = measure_loop(task.steps, state, engine) | {"synced": ENGINES[task.engine].synced}
        else:
            values = MEASURES[task.measure](task.saves, state, engine)
    return values | {"state_nbytes": total(state.nbytes), "tensors": len(state.tensors), "verified": True}


@contextmanager
def _engine(task: Task, state: State) -> Iterator[Engine]:
    engine = ENGINES[task.engine].make(state, Place(task.url), task.measure != "cached")
    try:
        yield engine
    finally:
        engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
