"""What is measured of an engine, each in processes of its own. On every rank, in step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias, cast

from benchmarks.engines import AsyncEngine, Engine
from benchmarks.gauges import (
    device_bytes_read,
    everywhere,
    forget,
    forget_peak,
    of_all_ranks,
    peak_memory,
    rank,
    remember,
    slowest,
    status,
    timed,
    together,
    total,
    unsynced,
)
from benchmarks.states import State

Values: TypeAlias = dict[str, Any]

_MOST_STEPS = 400
"""Training steps that go by at most while one save is under way."""


class WrongContentError(Exception):
    """What was loaded is not what was saved: no number of this engine counts."""


def _save(saves: int, state: State, engine: Engine, before: Callable[[], object] = lambda: None) -> Values:
    """Saves one after the other, each after `before`; the last is left for "load" and its like."""
    seconds = []
    with peak_memory() as memory:
        for step in range(saves):
            before()
            seconds.append(timed(lambda step=step: engine.save(step)))  # type: ignore[misc]
    together()
    sizes = engine.place(saves - 1).files()
    _check(saves - 1, state, engine)
    return {
        "first_s": seconds[0],
        "seconds": seconds[1:],
        "files": len(sizes),
        "file_nbytes": sum(sizes.values()),
        "peak_nbytes": total(memory["peak"]),
        "phases": of_all_ranks(dict(engine.phases())),
    }


def _cached(saves: int, state: State, engine: Engine) -> Values:
    """The same without a sync: a save is over when its bytes are in the page cache.

    What earlier ones have left there is written first, or the kernel holds up whoever adds to it (2 s/GB, any engine).
    """
    with unsynced() as sync:
        return _save(saves, state, engine, before=sync)


def _load(saves: int, state: State, engine: Engine) -> Values:
    """One load into a state that holds something else, the first of this process, of files that lie in memory."""
    return _loaded(saves, state, engine, remember)


def _cold(saves: int, state: State, engine: Engine) -> Values:
    """The same, of files that have been dropped from memory."""
    return _loaded(saves, state, engine, forget)


def _reshard(saves: int, state: State, engine: Engine) -> Values:
    """A load of what another number of ranks saved: warm for the time, then cold for the bytes that were read."""
    warm = _loaded(saves, state, engine, remember)
    return warm | {"read_nbytes": _loaded(saves, state, engine, forget)["read_nbytes"]}


def _loaded(saves: int, state: State, engine: Engine, prepare: Callable[[Path], None]) -> Values:
    state.fill(0)
    expected = state.digests()
    state.fill(1)
    place = engine.place(saves - 1)
    together()
    for file in place.files() if rank() == 0 and place.is_local else ():
        prepare(Path(file))
    before = device_bytes_read()
    with peak_memory() as memory:
        seconds = timed(lambda: engine.load(saves - 1))
    read = device_bytes_read() - before
    compare(expected, state, engine)
    return {"seconds": [seconds], "peak_nbytes": total(memory["peak"]), "read_nbytes": total(read)}


def _stall(saves: int, state: State, engine: Engine) -> Values:
    """Saves while training goes on: what blocks it, and what it loses until the save is over."""
    asynchronous = cast(AsyncEngine, engine)
    forget_peak()
    plain = [timed(lambda: _train(state)) for _ in range(4)][1:]
    seen: list[tuple[float, float, float, int]] = []
    expected: dict[str, int] = {}
    with peak_memory(before=status("self", "VmHWM")) as memory:
        for step in range(saves):
            expected = state.digests() if step == saves - 1 else {}
            seen.append(_train_on(asynchronous, step, state))
            plain.append(timed(lambda: _train(state)))
    engine.load(saves - 1)
    compare(expected, state, engine)
    blocked, waited, during = (slowest([row[column] for row in seen]) for column in range(3))
    stalls = slowest([row[0] + row[1] for row in seen])
    step_s = median(plain)
    undisturbed = [steps * step_s for *_, steps in seen]
    lost = [seconds - alone for seconds, alone in zip(during, undisturbed, strict=True)]
    return {
        **_told("blocked_s", blocked),
        **_told("waited_s", waited),
        **_told("stall_s", stalls),
        **_told("lost_s", lost),
        **_told("slowdown", [a / b for a, b in zip(lost, undisturbed, strict=True)]),
        "step_s": step_s,
        "peak_nbytes": total(memory["peak"]),
        "phases": of_all_ranks(dict(engine.phases())),
    }


def _train_on(engine: AsyncEngine, step: int, state: State) -> tuple[float, float, float, int]:
    """Seconds that `start` took, that the update waited, that it all took until the save was over; training steps."""
    together()
    began = time.perf_counter()
    started = engine.start(step)
    blocked = time.perf_counter() - began
    state.compute()
    waiting = time.perf_counter()
    started.before_update()
    waited = time.perf_counter() - waiting
    state.update()
    steps = 1
    while steps < _MOST_STEPS and not everywhere(started.done()):
        _train(state)
        steps += 1
    during = time.perf_counter() - began
    started.result()
    return blocked, waited, during, steps


def _told(name: str, numbers: list[float]) -> Values:
    return {f"first_{name}": numbers[0], name: numbers[1:]}


def _own(saves: int, state: State, engine: Engine) -> Values:
    """Processor time of all threads for a save of as many tensors with hardly any bytes: the engine's own work."""
    spent = []
    for step in range(saves):
        together()
        began = time.process_time()
        engine.save(step)
        spent.append(time.process_time() - began)
    _check(saves - 1, state, engine)
    return {"seconds": slowest(spent)[1:]}


MEASURES: Mapping[str, Callable[[int, State, Engine], Values]] = {
    "save": _save,
    "cached": _cached,
    "load": _load,
    "cold": _cold,
    "reshard": _reshard,
    "stall": _stall,
    "own": _own,
}


def _train(state: State) -> None:
    state.compute()
    state.update()


def _check(step: int, state: State, engine: Engine) -> None:
    expected = state.digests()
    state.fill(1)
    engine.load(step)
    compare(expected, state, engine)


def compare(expected: dict[str, int], state: State, engine: Engine) -> None:
    found = state.digests()
    wrong = [name for name, digest in expected.items() if found[name] != digest]
    if total(len(wrong) + (not expected)):
        raise WrongContentError(f"{type(engine).__name__}: {len(wrong)} tensors differ, for instance {wrong[:3]}")
