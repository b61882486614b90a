"""A bar for the person who waits for a load: one line on a terminal, there only while it takes longer than a moment.

A thread of its own draws it, and looks at the meter a few times a second: what loads never waits for a terminal.
Only the characters of a line and a carriage return are used, so that any terminal shows it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from shardckpt.engine.loading.fetching.meter import Meter

_log = logging.getLogger(__name__)

MOMENT_S = 2.0
"""What is over by then shows no bar."""
_REDRAW_S = 0.2
_FAREWELL_S = 1.0
"""How long the end of a load waits for the bar to be wiped away; a terminal that was stopped (Ctrl-S) takes nothing."""
_CELLS = 24
_FEWEST = 6
_AMOUNTS = 50
"""Columns that the numbers take, so that the bar does not change its length with them."""


@contextmanager
def shown(meter: Meter, what: str, *, alone: bool = True) -> Iterator[None]:
    """Show how far it is while the block runs, on stderr; not if that is no terminal, or warnings are switched off for
    this package (`logging`). On one rank; any thread. `alone`: no other rank is waited for."""
    stream = sys.stderr
    if not is_terminal(stream) or not _log.isEnabledFor(logging.WARNING):
        yield
        return
    over = threading.Event()
    drawing = threading.Thread(target=_draw, args=(meter, what, alone, stream, over), name="shardckpt-bar", daemon=True)
    meter.watched = True
    try:
        with suppress(RuntimeError):  # a process may be allowed no more threads
            drawing.start()
        yield
    finally:
        meter.watched = False
        over.set()
        if drawing.ident is not None:
            drawing.join(_FAREWELL_S)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees what is written there."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it was closed
        return False


def line(meter: Meter, what: str, columns: int, *, alone: bool, now: float) -> str:
    """What the bar shows, at most `columns` wide."""
    phase, total, done, seconds = meter.phase, meter.total, meter.done, now - meter.began
    if not total:
        return f"{what}: {phase}, {seconds:.0f} s"[:columns]
    if done >= total and not alone:
        return f"{what}: {phase} is done here, waiting for the other ranks"[:columns]
    part = min(done / total, 1.0)
    rate = done / seconds if seconds > 0 else 0.0
    left = f"  {_clock((total - done) / rate)} left" if rate and done < total else ""
    amounts = f"{_amount(done)} of {_amount(total)}  {_amount(rate)}/s{left}"
    head = f"{what}: {phase} "
    room = min(_CELLS, columns - len(head) - _AMOUNTS)
    full = round(part * room)
    cells = f"[{'#' * full}{'.' * (room - full)}] " if room >= _FEWEST else ""
    return f"{head}{cells}{part:4.0%}  {amounts}"[:columns]


def _draw(meter: Meter, what: str, alone: bool, stream: TextIO, over: threading.Event) -> None:
    """Until it is over; then the line is empty again. Ends early if the terminal goes away."""
    width = 0
    with suppress(OSError, ValueError):
        over.wait(MOMENT_S)
        while not over.is_set():
            if _in_front(stream):
                text = line(meter, what, _columns(stream) - 1, alone=alone, now=time.monotonic())
                stream.write(f"\r{text:<{width}}")
                stream.flush()
                width = len(text)
            over.wait(_REDRAW_S)
        if width:
            stream.write(f"\r{'':{width}}\r")
            stream.flush()


def _in_front(stream: TextIO) -> bool:
    """Whether the terminal is this program's to write to: one in the background may be stopped for doing so."""
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except OSError:  # not the terminal of this session, as of the workers of torchrun
        return True


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def _amount(nbytes: float) -> str:
    """ "1.2 GB"."""
    units = ["TB", "GB", "MB", "kB", "B"]
    while nbytes >= 999.5 and len(units) > 1:
        nbytes /= 1000
        units.pop()
    return f"{nbytes:.3g} {units[-1]}"


def _clock(seconds: float) -> str:
    """ "1:05", "2:00:00"."""
    minutes, rest = divmod(round(min(seconds, 359_999)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
