"""The loop: draw a case, read it, and see that nothing happened but a value or an error that was announced."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from types import FrameType
from typing import Any

from tests.hostile.formats import Format
from tests.hostile.watch import Watch, bounded_memory, watching

MOST_S = 5.0
"""Processor seconds for one case; most take a tenth of a millisecond."""
MOST_BYTES = 256 << 20
"""By which all cases of a run together may make memory grow."""
MOST_LETTERS = 20_000
"""Of a message."""


@dataclass
class Outcome:
    """What became of the cases."""

    read: int = 0
    refused: int = 0
    grown: int = 0
    """Cases that reached lines, after others, that none before had: they became seeds."""
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)
    ran: bool = False
    """Whether code of a file was run."""
    touched: list[str] = field(default_factory=list)
    """What was opened, imported or started that is none of its business."""

    def __str__(self) -> str:
        return f"{self.read} read, {self.refused} refused, {self.grown} seeds found, slowest {self.slowest_s:.3f} s"


def fuzz(form: Format, cases: int, *, seed: int, inside: str = "", growth: float = 0.05) -> Outcome:
    """Read so many cases of a format. The first of them (`growth`) are followed line by line, for the seeds they are.

    The cases follow from the format and the seed alone, so that one can be had again by its number.
    """
    rng, outcome, pool = Random(f"{form.name} {seed}"), Outcome(), list(form.seeds)
    with bounded_memory() as grown:
        for warm in range(20):  # what is imported at first use is imported now
            _read(form, form.change(Random(warm), pool), Outcome(), "warm")
        seen = _cases(form, cases, rng, pool, outcome, seed=seed, inside=inside, growth=growth)
        if grown() > MOST_BYTES:
            outcome.failures.append(f"memory grew by {grown() >> 20} MiB")
    outcome.ran, outcome.touched = seen.ran, seen.noticed
    return outcome


def _cases(
    form: Format, cases: int, rng: Random, pool: list[Any], outcome: Outcome, *, seed: int, inside: str, growth: float
) -> Watch:
    steps: Steps = set()
    with watching(inside) as seen:
        for number in range(cases):
            entry = form.change(rng, pool)
            if number < cases * growth:
                _follow(form, entry, pool, steps, outcome, f"case {number} of seed {seed}")
            else:
                _read(form, entry, outcome, f"case {number} of seed {seed}")
            if len(outcome.failures) > 20:
                break
    return seen


def _read(form: Format, entry: Any, outcome: Outcome, case: str) -> None:
    began = time.process_time()
    try:
        form.read(entry)
        outcome.read += 1
    except form.errors as error:
        outcome.refused += 1
        if _ran_out(error) or len(str(error)) > MOST_LETTERS:
            outcome.failures.append(f"{case}: {type(error).__name__} of {len(str(error))} letters: {entry!r:.2000}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome.failures.append(f"{case}: {type(error).__name__}: {error!s:.300} from {entry!r:.2000}")
    elapsed = time.process_time() - began
    outcome.slowest_s = max(outcome.slowest_s, elapsed)
    if elapsed > MOST_S:
        outcome.failures.append(f"{case}: hangs, {elapsed:.1f} s for {entry!r:.2000}")


def _ran_out(error: BaseException) -> bool:
    """Whether memory ran out, behind whatever it was told as."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, MemoryError):
            return True
        link = link.__cause__ or link.__context__
    return False


Steps = set[tuple[str, int, int]]
"""Which line of which file came after which."""


def _follow(form: Format, entry: Any, pool: list[Any], steps: Steps, outcome: Outcome, case: str) -> None:
    """Read the case with an eye on which line follows which; if a pair is new, the case becomes a seed."""
    before = len(steps)
    sys.settrace(_tracer(form.sources, steps))
    try:
        _read(form, entry, outcome, case)
    finally:
        sys.settrace(None)
    if len(steps) > before and (seed := form.seed_of(entry)) is not None:
        pool.append(seed)
        outcome.grown += 1


def _tracer(modules: tuple[str, ...], steps: Steps) -> Callable[..., Any]:
    last = 0

    def in_frame(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal last
        steps.add((frame.f_code.co_filename, last, frame.f_lineno))
        last = frame.f_lineno
        return in_frame

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        name = os.path.splitext(os.path.basename(frame.f_code.co_filename))[0]
        return in_frame if name in modules else None

    return on_call
