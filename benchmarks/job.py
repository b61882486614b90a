"""One freshly started process, or one under torchrun: makes the state, measures one thing of one engine, and ends.

Started by `benchmarks.rounds` as `python -m benchmarks.job TASK.json`. Every rank does the same; the times are those
of the slowest rank, the bytes are those of all together. Nothing is reported before what was saved has been loaded
and compared.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks.engines import ENGINES, AsyncEngine, Engine
from benchmarks.limits import forget, measure_limits, remember
from benchmarks.states import Shape, State, make

Measure: TypeAlias = Literal["limits", "save", "load", "cold", "stall", "own"]
Values: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """What one job is to do; travels as a JSON file."""

    measure: Measure
    engine: str
    shape: Shape
    folder: str
    """Where the engine saves; "load" and "cold" find there what "save" has left."""
    saves: int
    """How many saves, the first of which is told apart."""
    steps: int = 3
    """Training steps that go by between two saves, of those that are measured with training."""

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Task:
        content = json.loads(text)
        return cls(**{**content, "shape": Shape(**content["shape"])})


class WrongContentError(Exception):
    """What was loaded is not what was saved: no number of this engine counts."""


def main(path: Path) -> None:
    """Do the task and write `result.json` beside it."""
    task = Task.decode(path.read_text())
    if _world() > 1:
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (_world(),)) if _world() > 1 else None
    try:
        values = _limits(task) if task.measure == "limits" else measure(task, mesh)
        if _rank() == 0:
            path.with_name("result.json").write_text(json.dumps(values))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _limits(task: Task) -> Values:
    """Of the machine: by one process whatever the number of ranks."""
    values = measure_limits(Path(task.folder), task.shape.nbytes) if _rank() == 0 else {}
    _together()
    return values


def measure(task: Task, mesh: DeviceMesh | None) -> Values:
    """Everything but "limits". `WrongContentError` on every rank if what was loaded is not what was saved."""
    state = make(task.shape, rank=_rank(), mesh=mesh)
    with _engine(task, state) as engine:
        values = _MEASURES[task.measure](task, state, engine)
    return values | {"state_nbytes": _sum(state.nbytes), "tensors": len(state.tensors), "verified": True}


def _save(task: Task, state: State, engine: Engine) -> Values:
    """Durable saves one after the other; the last is left for "load"."""
    with _memory() as memory:
        seconds = [_timed(lambda step=step: engine.save(step)) for step in range(task.saves)]  # type: ignore[misc]
    files = _files(engine, task.saves - 1)
    _check(task.saves - 1, state, engine)
    return {
        "first_s": seconds[0],
        "seconds": seconds[1:],
        "files": len(files),
        "file_nbytes": sum(os.stat(file).st_size for file in files),
        "peak_nbytes": _sum(memory["peak"]),
        "phases": dict(engine.phases()),
    }


def _load(task: Task, state: State, engine: Engine) -> Values:
    """One load into a state that holds something else, the first of this process, of files that lie in memory."""
    return _loaded(task, state, engine, remember)


def _cold(task: Task, state: State, engine: Engine) -> Values:
    """The same, of files that have been dropped from memory."""
    return _loaded(task, state, engine, forget)


def _loaded(task: Task, state: State, engine: Engine, prepare: Callable[[Path], None]) -> Values:
    expected = state.digests()
    state.fill(1)
    step = task.saves - 1
    files = _files(engine, step)
    for file in files if _rank() == 0 else ():
        prepare(file)
    with _memory() as memory:
        seconds = _timed(lambda: engine.load(step))
    _compare(expected, state, engine)
    return {"seconds": [seconds], "peak_nbytes": _sum(memory["peak"])}


def _stall(task: Task, state: State, engine: Engine) -> Values:
    """Saves while training goes on: what blocks it, and what it loses until the save is over."""
    asynchronous = cast(AsyncEngine, engine)
    _forget_peak()
    plain = [_timed(lambda: _train(state)) for _ in range(3)][1:]
    blocked, waited, several = [], [], []
    expected: dict[str, int] = {}
    with _memory(before=_status("self", "VmHWM")) as memory:
        for step in range(task.saves):
            expected = state.digests() if step == task.saves - 1 else {}
            _together()
            began = time.perf_counter()
            started = asynchronous.start(step)
            blocked.append(time.perf_counter() - began)
            state.compute()
            waiting = time.perf_counter()
            started.before_update()
            waited.append(time.perf_counter() - waiting)
            state.update()
            for _ in range(task.steps - 1):
                _train(state)
            several.append(time.perf_counter() - began)
            started.result()
            plain.append(_timed(lambda: _train(state)))
    engine.load(task.saves - 1)
    _compare(expected, state, engine)
    blocked, waited, several = _slowest(blocked), _slowest(waited), _slowest(several)
    stalls = _slowest([a + b for a, b in zip(blocked, waited, strict=True)])
    lost = [seconds - task.steps * median(plain) for seconds in several]
    return {
        "first_blocked_s": blocked[0],
        "blocked_s": blocked[1:],
        "first_stall_s": stalls[0],
        "stall_s": stalls[1:],
        "first_lost_s": lost[0],
        "lost_s": lost[1:],
        "step_s": median(plain),
        "peak_nbytes": _sum(memory["peak"]),
        "phases": dict(engine.phases()),
    }


def _own(task: Task, state: State, engine: Engine) -> Values:
    """Processor time of all threads for a save of as many tensors with hardly any bytes: the engine's own work."""
    spent = []
    for step in range(task.saves):
        _together()
        began = time.process_time()
        engine.save(step)
        spent.append(time.process_time() - began)
    _check(task.saves - 1, state, engine)
    return {"seconds": _slowest(spent)[1:]}


_MEASURES: dict[str, Callable[[Task, State, Engine], Values]] = {
    "save": _save,
    "load": _load,
    "cold": _cold,
    "stall": _stall,
    "own": _own,
}


@contextmanager
def _engine(task: Task, state: State) -> Iterator[Engine]:
    engine = ENGINES[task.engine].make(state, Path(task.folder))
    try:
        yield engine
    finally:
        engine.close()


def _train(state: State) -> None:
    state.compute()
    state.update()


def _check(step: int, state: State, engine: Engine) -> None:
    expected = state.digests()
    state.fill(1)
    engine.load(step)
    _compare(expected, state, engine)


def _compare(expected: dict[str, int], state: State, engine: Engine) -> None:
    found = state.digests()
    wrong = [name for name, digest in expected.items() if found[name] != digest]
    if _sum(len(wrong) + (not expected)):
        raise WrongContentError(f"{type(engine).__name__}: {len(wrong)} tensors differ, for instance {wrong[:3]}")


def _files(engine: Engine, step: int) -> list[Path]:
    _together()
    return sorted(path for path in engine.folder(step).rglob("*") if path.is_file())


@contextmanager
def _memory(before: int | None = None) -> Iterator[dict[str, int]]:
    """`peak`: the most bytes that this process and its children held beyond what it held before (or `before`).

    What a child shares with others or maps from files is left out, so that a copy in shared memory counts once.
    """
    gc.collect()
    if before is None:
        _forget_peak()
        before = _status("self", "VmRSS")
    found: dict[str, int] = {}
    yield found
    own = [str(child) for child in _children()]
    beside = sum(_status(child, "VmHWM") - _status(child, "RssShmem") - _status(child, "RssFile") for child in own)
    found["peak"] = _status("self", "VmHWM") - before + beside


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: man 5 proc


def _status(process: str, field: str) -> int:
    """Bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), 0)


def _children() -> list[int]:
    return [int(n) for path in Path("/proc/self/task").glob("*/children") for n in path.read_text().split()]


def _timed(work: Callable[[], None]) -> float:
    """Seconds until the slowest rank is done."""
    _together()
    began = time.perf_counter()
    work()
    return _slowest([time.perf_counter() - began])[0]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _together() -> None:
    if _world() > 1:
        dist.barrier()


def _slowest(seconds: list[float]) -> list[float]:
    return _reduced(seconds, dist.ReduceOp.MAX)


def _sum(number: int) -> int:
    return int(_reduced([float(number)], dist.ReduceOp.SUM)[0])


def _reduced(numbers: list[float], how: Any) -> list[float]:
    tensor = torch.tensor(numbers, dtype=torch.float64)
    if _world() > 1:
        dist.all_reduce(tensor, how)
    reduced: list[float] = tensor.tolist()
    return reduced


if __name__ == "__main__":
    main(Path(sys.argv[1]))
