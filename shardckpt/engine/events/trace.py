"""A trace of saves, for Perfetto (ui.perfetto.dev) and chrome://tracing: who did what when, by rank and thread."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from shardckpt.engine.events.facts import name_of
from shardckpt.engine.events.kinds import Committed, Event, Loaded, SaveFailed, SaveOver, SaveSkipped, StopAgreed
from shardckpt.engine.progress import OtherRank, Phase

_log = logging.getLogger(__name__)

_SAVES, _ROWS = "saves", 1000
"""Name of the rows of whole saves, and by how much they come before those of threads."""
_HEAD, _TAIL = b"[\n", b"\n]\n"
"""The array form of the Trace Event Format, whose readers take a file that ends early for what it has."""


class Trace:
    """Subscribe it (`checkpoints.subscribe(Trace("trace.json"))`) on all ranks; rank 0 writes the file, for all.

    A process of the trace is a rank. The first of its rows, `saves`, has a bar for each save, from the call to its end,
    with step and `outcome` ("committed", "failed", "skipped", or "unknown" where nobody knows); below it lie the
    phases, by thread. Saves that are under way at the same time have rows of their own. Of the other ranks it has the
    bar, once they have met, which ends when the save is over on rank 0, and what they did until their files were
    written. Times are those of each rank's own clock. The file is complete after every save, and grows by what is new:
    of a process that is killed, it has all saves that were over; cut in the middle of a line, viewers show what stands
    before it.

    An older file is never touched: where `trace.json` exists, this run writes `trace.1.json`, or the next name that is
    free, and says so in the log (INFO).

    Args:
        path: a local file, made with the first event.
        steps: only these; all, if not given.
    """

    def __init__(self, path: str | os.PathLike[str], *, steps: Collection[int] | None = None) -> None:
        self._path = os.fspath(path)
        self._steps = steps
        self._threads: dict[tuple[int, str], int] = {}
        self._busy: dict[int, list[int]] = {}
        """By rank, for each row of saves: until when it is taken, in microseconds."""
        self._end: int | None = None

    @property
    def path(self) -> str:
        """Where this run's events are, or will be if the name is still free at the first of them."""
        return self._path

    def __call__(self, event: Event) -> None:
        if event.rank != 0 or (self._steps is not None and event.step not in self._steps):
            return
        lines = [json.dumps(line, separators=(",", ":")) for line in self._lines(event)]
        if lines:
            self._append(",\n".join(lines).encode())

    def _lines(self, event: Event) -> Iterator[dict[str, Any]]:
        step = {"step": event.step}
        if isinstance(event, SaveOver):
            outcome = step | _outcome(event)
            for each in (OtherRank(0, event.report.began, tuple(event.report.phases)), *event.others):
                yield from self._bar(each, event.at, outcome)
                yield from self._phases(each.rank, each.phases, step)
        elif isinstance(event, Loaded):
            yield from self._phases(0, [Phase("load", event.at - event.seconds, event.seconds, "training")], step)
        if isinstance(event, Committed | SaveFailed | StopAgreed):
            mark = {"name": f"step {event.step} {name_of(event)}", "cat": "checkpoint", "ph": "i", "s": "p"}
            yield {**mark, "ts": _us(event.at), "pid": 0, "tid": 0}

    def _bar(self, save: OtherRank, end: float, what: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """All of a save, in the first row of saves that is free. It encloses its phases, also where the clocks of two
        ranks, or what was read of the same one in two ways, differ."""
        began = _us(min([save.began, *(phase.began for phase in save.phases)]))
        ended = max([began, _us(end), *(_us(phase.ended) for phase in save.phases)])
        rows = self._busy.setdefault(save.rank, [])
        row = next((number for number, busy in enumerate(rows) if busy <= began), len(rows))
        rows[row:] = [ended, *rows[row + 1 :]]
        name = _SAVES if row == 0 else f"{_SAVES} ({row + 1})"
        yield from self._span(save.rank, name, (f"step {what['step']}", began, ended), what)

    def _phases(self, rank: int, phases: Iterable[Phase], what: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for phase in sorted(phases, key=lambda phase: (phase.began, -phase.seconds)):
            yield from self._span(rank, phase.thread, (phase.name, _us(phase.began), _us(phase.ended)), what)

    def _span(
        self, rank: int, thread: str, span: tuple[str, int, int], what: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Name, begin and end; both are rounded, and not the duration, so that what nests does."""
        number = self._threads.get((rank, thread))
        if number is None:
            number = self._threads[rank, thread] = 1 + sum(known == rank for known, _ in self._threads)
            if number == 1:
                yield _meta("process_name", rank, 0, name=f"rank {rank}")
            yield _meta("thread_name", rank, number, name=thread)
            yield _meta("thread_sort_index", rank, number, sort_index=number - _ROWS * thread.startswith(_SAVES))
        name, began, ended = span
        at = {"ts": began, "dur": ended - began, "pid": rank, "tid": number}
        yield {"name": name, "cat": "checkpoint", "ph": "X", **at, "args": what}

    def _append(self, content: bytes) -> None:
        if self._end is None:
            self._make()
        assert self._end is not None
        content = content if self._end == len(_HEAD) else b",\n" + content
        with open(self._path, "r+b") as file:
            file.seek(self._end)
            file.write(content + _TAIL)
            file.truncate()  # what an earlier one that failed may have left
        self._end += len(content)

    def _make(self) -> None:
        """A file of this run's own, of the first name that is free."""
        wanted, (stem, ending) = self._path, os.path.splitext(self._path)
        for number in itertools.count(1):
            try:
                with open(self._path, "xb") as file:
                    file.write(_HEAD + _TAIL)
                break
            except FileExistsError:
                self._path = f"{stem}.{number}{ending}"
        if self._path != wanted:
            _log.info("%s exists already; this run's trace is %s", wanted, self._path)
        self._end = len(_HEAD)


def _outcome(event: SaveOver) -> dict[str, str]:
    outcome = {"outcome": name_of(event)}
    if isinstance(event, SaveFailed):
        return outcome | {"error": event.error}
    return outcome | {"reason": event.reason} if isinstance(event, SaveSkipped) else outcome


def _meta(kind: str, rank: int, thread: int, **what: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": what}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
