"""A training loop with a save before every tenth step, by turns with the same loop without saves and with bare ones.

A bare save is what no engine can do without: the state is copied into warm memory while the next forward and backward
pass run, the optimizer waits for that, and one file a rank is written past the page cache and synced. There are no
sums, no plan, no talk between ranks, no record. What the loop takes longer with bare saves than without is the
device's share: memory bandwidth, processor time of copy and write, interrupts. Each loop ends with its last step; the
wait until all is on the device comes after it and is told apart. What was saved in the loop is loaded and compared.
"""

from __future__ import annotations

import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch

from benchmarks.engines import AsyncEngine, Engine, Started, sync_all
from benchmarks.gauges import of_all_ranks, processor_s, rank, slowest, timed, together
from benchmarks.limits import DIRECT, write_file
from benchmarks.measures import compare
from benchmarks.states import State

Values: TypeAlias = dict[str, Any]

EVERY = 10
"""Steps from a save to the next."""
_TURNS = ("plain", "bare", "saved", "saved", "bare", "plain")
"""Forth and back: a machine that becomes slower meanwhile does it to all three."""
_PAGE = 4096


@dataclass(slots=True)
class _Turn:
    """One loop. Seconds are those of the slowest rank, processor time and bytes those of all together."""

    seconds: float = 0.0
    end_s: float = 0.0
    """From the last step until everything is on the device."""
    stalls: list[float] = field(default_factory=list)
    """Of each save: the wait for the one before, the call, and the wait before the optimizer step."""
    processor_s: float = 0.0
    nbytes: int = 0


def measure_loop(steps: int, state: State, engine: Engine) -> Values:
    """On every rank, in step; `steps` is a multiple of `EVERY`. The engine's place must be a folder."""
    with _bare(state, engine.place(0).path.parent / "bare") as bare:
        loops = _Loops(state, cast(AsyncEngine, engine), bare)
        first = {kind: loops.take(kind, saves=1, every=2) for kind in ("plain", "bare", "saved")}
        turns: dict[str, list[_Turn]] = {kind: [] for kind in first}
        for kind in _TURNS:
            turns[kind].append(loops.take(kind, saves=steps // EVERY, every=EVERY))
    plain, bare_s, saved = ([turn.seconds for turn in turns[kind]] for kind in ("plain", "bare", "saved"))
    return {
        "steps": steps,
        "plain_s": plain,
        "bare_s": bare_s,
        "saved_s": saved,
        "over_plain": sum(saved) / sum(plain),
        "over_bare": sum(saved) / sum(bare_s),
        "bare_over_plain": sum(bare_s) / sum(plain),
        "lost_s": (sum(saved) - sum(plain)) / len(saved),
        "first_stall_s": first["saved"].stalls[0],
        **_beside(turns["saved"], turns["plain"]),
        **{f"bare_{name}": value for name, value in _beside(turns["bare"], turns["plain"]).items()},
        "phases": of_all_ranks(dict(engine.phases())),
    }


def _beside(turns: list[_Turn], plain: list[_Turn]) -> Values:
    """What the saves were like; processor time, per save, is what the loop without saves did not take."""
    saves = sum(len(turn.stalls) for turn in turns)
    spent, alone = (sum(turn.processor_s for turn in those) for those in (turns, plain))
    return {
        "end_s": [turn.end_s for turn in turns],
        "stall_s": [stall for turn in turns for stall in turn.stalls],
        "processor_s": (spent - alone) / saves,
        "file_nbytes": sum(turn.nbytes for turn in turns) / saves,
    }


class _Loops:
    """The three kinds of loop on one state."""

    def __init__(self, state: State, engine: AsyncEngine, bare: _Bare) -> None:
        self._state = state
        self._engine = engine
        self._bare = bare
        self._step = 0

    def take(self, kind: str, *, saves: int, every: int) -> _Turn:
        """`kind` is "plain", "bare" or "saved"; what it has left on the disk is gone afterwards."""
        together()
        if rank() == 0:
            os.sync()  # so that no loop pays for what an earlier one left
        if kind == "plain":
            return self._timed(lambda: _NOTHING, lambda: None, saves, every)
        if kind == "bare":
            turn = self._timed(self._bare.start, lambda: None, saves, every)
            turn.nbytes = sum(of_all_ranks(self._bare.forget()))
            return turn
        return self._saved(saves, every)

    def _saved(self, saves: int, every: int) -> _Turn:
        """The save that is compared is the first: what the state was then is known without stopping the clock."""
        expected, first = self._state.digests(), self._step
        turn = self._timed(self._start, lambda: self._make_durable(first), saves, every)
        places = [self._engine.place(step) for step in range(first, self._step)]
        turn.nbytes = sum(nbytes for place in places for nbytes in place.files().values())
        self._engine.load(first)
        compare(expected, self._state, self._engine)
        for place in places if rank() == 0 else ():
            shutil.rmtree(place.path)
        return turn

    def _start(self) -> Started:
        started = self._engine.start(self._step)
        self._step += 1
        return started

    def _make_durable(self, first: int) -> None:
        """What the engine has not synced by itself, on all ranks."""
        together()
        for step in range(first, self._step) if rank() == 0 else ():
            sync_all(self._engine.place(step))

    def _timed(self, start: Callable[[], Started], finish: Callable[[], None], saves: int, every: int) -> _Turn:
        turn, last = _Turn(), _NOTHING
        before = processor_s()

        def train() -> None:
            nonlocal last
            for _ in range(saves):
                last = self._stretch(start, last, every, turn.stalls)

        def end() -> None:
            last.result()
            finish()

        turn.seconds, turn.end_s = timed(train), timed(end)
        turn.processor_s = sum(of_all_ranks(processor_s() - before))
        turn.stalls = slowest(turn.stalls)
        return turn

    def _stretch(self, start: Callable[[], Started], last: Started, every: int, stalls: list[float]) -> Started:
        """A save and the steps that go by until the next."""
        began = time.perf_counter()
        last.result()
        started = start()
        stalled = time.perf_counter() - began
        for step in range(every):
            self._state.compute()
            if step == 0:
                began = time.perf_counter()
                started.before_update()
                stalls.append(stalled + time.perf_counter() - began)
            self._state.update()
        return started


class _Nothing:
    """No save is under way."""

    def before_update(self) -> None: ...

    def done(self) -> bool:
        return True

    def result(self) -> None: ...


_NOTHING: Started = _Nothing()


class _Bare:
    """Bare saves of this rank's bytes; its one thread does one after the other."""

    def __init__(self, state: State, folder: Path, pool: ThreadPoolExecutor) -> None:
        self._folder = folder
        self._pool = pool
        self._written: list[Path] = []
        sizes = [-(-local.nbytes // 64) * 64 for _, local in state.locals()]
        self._memory = mmap.mmap(-1, max(1, -(-sum(sizes) // _PAGE)) * _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        flat, at = torch.frombuffer(self._memory, dtype=torch.uint8), 0
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for (_, local), size in zip(state.locals(), sizes, strict=True):
            self._pairs.append((flat[at : at + local.nbytes].view(local.dtype).view(local.shape), local.detach()))
            at += size

    def start(self) -> Started:
        path = self._folder / f"{rank()}.{len(self._written)}"
        self._written.append(path)
        copied = self._pool.submit(self._copy)
        return _BareSave(copied, self._pool.submit(self._write, path, copied))

    def forget(self) -> int:
        """Remove the files, all of which are written; bytes that they had."""
        nbytes = sum(path.stat().st_size for path in self._written)
        for path in self._written:
            path.unlink()
        self._written.clear()
        return nbytes

    def _copy(self) -> None:
        for target, source in self._pairs:
            target.copy_(source)

    def _write(self, path: Path, copied: Future[None]) -> None:
        copied.result()
        write_file(path, self._memory, DIRECT, synced=True)


@contextmanager
def _bare(state: State, folder: Path) -> Iterator[_Bare]:
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1, "bare") as pool:
        yield _Bare(state, folder, pool)


@dataclass(frozen=True, slots=True)
class _BareSave:
    copied: Future[None]
    written: Future[None]

    def before_update(self) -> None:
        self.copied.result()

    def done(self) -> bool:
        return self.written.done()

    def result(self) -> None:
        self.written.result()
