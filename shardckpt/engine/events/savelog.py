"""A log of saves: one line of JSON for each that is over, for `shardckpt report` and for programs of one's own."""

from __future__ import annotations

import json
import os
from typing import Any

from shardckpt.engine.events.facts import costs_of, name_of, problem_of
from shardckpt.engine.events.kinds import Deleted, Event, Loaded, Measured, SaveOver, SubscriberFailed
from shardckpt.engine.progress import OtherRank


class SaveLog:
    """Subscribe it (`checkpoints.subscribe(SaveLog("runs/a/saves.jsonl"))`) on all ranks; rank 0 writes, for all.

    A later job of the same run goes on in the same file. Each line is an object with `event` ("committed", "failed",
    "skipped", "unknown" where nobody knows whether it was committed; "deleted"; "loaded"; "measured", with `metrics`;
    "subscriber failed", with `error`), `step` and `at` (seconds since 1970). Of saves it has `nbytes` of the whole
    checkpoint, `stall_s`, `overlap_s`, `stage_s`, `write_s`, `commit_s`, `total_s`, `rate`, `retries`, `slowest_rank`,
    `slowest_s`, `error`, and `ranks`: of each, as far as rank 0 has met it, `[rank, began, [[phase, began, seconds],
    ...]]`, by that rank's clock.

    A line is appended by one write: a process that is killed leaves at most its last line cut off, and the next job
    begins a new one. Two jobs that write to the same file at once do not mix within lines, on a local file system.

    Args:
        path: a local file; its folder is made with the first event.
        ranks: phases are noted of so many ranks at most: of rank 0, and those whose writing took longest.
    """

    def __init__(self, path: str | os.PathLike[str], *, ranks: int = 64) -> None:
        self._path = os.fspath(path)
        self._ranks = ranks
        self._begun = False

    def __call__(self, event: Event) -> None:
        if event.rank != 0:
            return
        about = {"event": name_of(event), "step": event.step, "at": round(event.at, 3)}
        if isinstance(event, SaveOver):
            self._append(about | self._facts(event))
        elif isinstance(event, Deleted):
            self._append(about)
        elif isinstance(event, Loaded):
            self._append(about | {"nbytes": event.nbytes, "total_s": round(event.seconds, 6)})
        elif isinstance(event, Measured):
            self._append(about | {"metrics": dict(event.metrics)})
        elif isinstance(event, SubscriberFailed):
            self._append(about | {"error": problem_of(event)})

    def _facts(self, event: SaveOver) -> dict[str, Any]:
        facts: dict[str, Any] = costs_of(event.report) | {"slowest_rank": event.report.slowest_rank}
        if problem_of(event):
            facts["error"] = problem_of(event)
        return facts | {"ranks": self._phases(event)}

    def _phases(self, event: SaveOver) -> list[list[Any]]:
        """Of rank 0 and the slowest of the others, by rank."""
        slowest = sorted(event.others, key=_writing, reverse=True)[: max(0, self._ranks - 1)]
        own = OtherRank(0, event.report.began, tuple(event.report.phases))
        return [
            [each.rank, _ms(each.began), [[p.name, _ms(p.began), round(p.seconds, 6)] for p in each.phases]]
            for each in sorted([own, *slowest], key=lambda each: each.rank)
        ]

    def _append(self, line: dict[str, Any]) -> None:
        content = json.dumps(line, separators=(",", ":")) + "\n"
        if not self._begun:
            os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
        with open(self._path, "a+b") as file:
            if not self._begun and file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    content = "\n" + content
            file.write(content.encode())
        self._begun = True


def _writing(rank: OtherRank) -> float:
    """Of other ranks only these phases are known to be over."""
    return sum(phase.seconds for phase in rank.phases if phase.name in ("seal", "put"))


def _ms(seconds: float) -> float:
    return round(seconds, 4)
