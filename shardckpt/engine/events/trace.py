"""A trace of saves, for Perfetto (ui.perfetto.dev) and chrome://tracing: who did what when, by rank and thread."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from shardckpt.engine.events.kinds import Committed, Event, Loaded, SaveFailed, StopAgreed
from shardckpt.engine.progress import Phase

_log = logging.getLogger(__name__)

_HEAD, _TAIL = b"[\n", b"\n]\n"
"""The array form of the Trace Event Format, whose readers take a file that ends early for what it has."""


class Trace:
    """Subscribe it (`checkpoints.subscribe(Trace("trace.json"))`) on all ranks; rank 0 writes the file, for all.

    A process of the trace is a rank. Of the other ranks it has what they did until their files were written. Times are
    those of each rank's own clock. The file is complete after every save, and grows by what is new: of a process that
    is killed, it has all saves that were over; cut in the middle of a line, viewers show what stands before it.

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
        if isinstance(event, Committed | SaveFailed):
            failed = {"error": event.error} if isinstance(event, SaveFailed) else {}
            yield from self._phases(0, event.report.phases, {"step": event.step, **failed})
        if isinstance(event, Committed):
            for rank, phases in event.others:
                yield from self._phases(rank, phases, {"step": event.step})
        elif isinstance(event, Loaded):
            yield from self._phases(
                0, [Phase("load", event.at - event.seconds, event.seconds, "training")], {"step": event.step}
            )
        if isinstance(event, Committed | SaveFailed | StopAgreed):
            name = {Committed: "committed", SaveFailed: "failed", StopAgreed: "stop agreed"}[type(event)]
            mark = {"name": f"step {event.step} {name}", "cat": "checkpoint", "ph": "i", "s": "p"}
            yield {**mark, "ts": _us(event.at), "pid": 0, "tid": 0}

    def _phases(self, rank: int, phases: Iterable[Phase], what: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for phase in sorted(phases, key=lambda phase: (phase.began, -phase.seconds)):
            number = self._threads.get((rank, phase.thread))
            if number is None:
                number = self._threads[rank, phase.thread] = 1 + sum(known == rank for known, _ in self._threads)
                if number == 1:
                    yield _named("process_name", rank, 0, f"rank {rank}")
                yield _named("thread_name", rank, number, phase.thread)
            began, ended = _us(phase.began), _us(phase.began + phase.seconds)  # rounded alike, so that what nests does
            at = {"ts": began, "dur": ended - began, "pid": rank, "tid": number}
            yield {"name": phase.name, "cat": "checkpoint", "ph": "X", **at, "args": what}

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


def _named(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
