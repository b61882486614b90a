"""A trace of saves, for Perfetto (ui.perfetto.dev) and chrome://tracing: who did what when, by rank and thread."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from shardckpt.engine.events.kinds import Committed, Event, Loaded, SaveFailed, StopAgreed
from shardckpt.engine.progress import Phase

_HEAD, _TAIL = b'{"displayTimeUnit":"ms","traceEvents":[\n', b"\n]}\n"


class Trace:
    """Subscribe it (`checkpoints.subscribe(Trace("trace.json"))`) on all ranks; rank 0 writes the file, for all.

    A process of the trace is a rank. Of the other ranks it has what they did until their files were written. Times are
    those of each rank's own clock. The file is complete after every save, and grows by what is new; an older file of
    that name is replaced.

    Args:
        path: a local file.
        steps: only these; all, if not given.
    """

    def __init__(self, path: str | os.PathLike[str], *, steps: Collection[int] | None = None) -> None:
        self._path = os.fspath(path)
        self._steps = steps
        self._threads: dict[tuple[int, str], int] = {}
        self._begun = False

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
        for phase in phases:
            number = self._threads.get((rank, phase.thread))
            if number is None:
                number = self._threads[rank, phase.thread] = 1 + sum(known == rank for known, _ in self._threads)
                if number == 1:
                    yield _named("process_name", rank, 0, f"rank {rank}")
                yield _named("thread_name", rank, number, phase.thread)
            at = {"ts": _us(phase.began), "dur": _us(phase.seconds), "pid": rank, "tid": number}
            yield {"name": phase.name, "cat": "checkpoint", "ph": "X", **at, "args": what}

    def _append(self, content: bytes) -> None:
        with open(self._path, "r+b" if self._begun else "w+b") as file:
            if self._begun:
                file.seek(-len(_TAIL), os.SEEK_END)
                file.write(b",\n" + content + _TAIL)
            else:
                file.write(_HEAD + content + _TAIL)
        self._begun = True


def _named(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
