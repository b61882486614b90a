"""`SaveLog`: a line for each save that is over, whatever became of it; a later job goes on after a cut-off line."""

from __future__ import annotations

import json
from pathlib import Path

from shardckpt.engine.events.kinds import Committed, Deleted, Loaded, SaveFailed, SaveSkipped, Staged
from shardckpt.engine.events.savelog import SaveLog
from shardckpt.engine.progress import OtherRank, Phase, SaveReport


def over(step: int) -> dict:
    report = SaveReport(step, nbytes=5, total_nbytes=20, stall_s=0.25, total_s=2.0, began=100.0, slowest_rank=2)
    report.phases = [Phase("save", 100.0, 0.25, "main"), Phase("write", 101.0, 1.0, "save")]
    return {"step": step, "rank": 0, "at": 102.0, "report": report}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_save_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "run" / "saves.jsonl"
    log = SaveLog(path)
    log(Staged(step=1, rank=0, at=1.0, seconds=1.0))
    assert not path.exists()
    others = (OtherRank(1, 100.5, (Phase("write", 101.0, 0.5, "save"),)), OtherRank(2, 100.25))
    log(Committed(**over(1), others=others))
    log(SaveFailed(**over(2), error="no room", kind="CheckpointSaveError"))
    log(SaveFailed(**over(3), error="?", kind="CommitUnknownError"))
    log(SaveSkipped(**over(4), reason="busy"))
    log(Deleted(step=1, rank=0, at=103.0))
    log(Loaded(step=1, rank=0, at=104.0, seconds=1.5, nbytes=20))
    log(Committed(**over(5) | {"rank": 1}))
    found = lines(path)
    assert [line["event"] for line in found] == ["committed", "failed", "unknown", "skipped", "deleted", "loaded"]
    assert [line.get("error") for line in found] == [None, "no room", "?", "busy", None, None]
    first = found[0]
    assert (first["step"], first["nbytes"], first["stall_s"], first["total_s"], first["rate"]) == (1, 20, 0.25, 2, 10)
    assert first["ranks"] == [
        [0, 100.0, [["save", 100.0, 0.25], ["write", 101.0, 1.0]]],
        [1, 100.5, [["write", 101.0, 0.5]]],
        [2, 100.25, []],
    ]


def test_of_many_ranks_the_slowest_are_noted(tmp_path: Path) -> None:
    log = SaveLog(tmp_path / "log", ranks=3)
    others = tuple(OtherRank(rank, 1.0, (Phase("put", 1.0, rank % 5, "save"),)) for rank in range(1, 10))
    log(Committed(**over(1), others=others))
    assert [rank for rank, *_ in lines(tmp_path / "log")[0]["ranks"]] == [0, 4, 9]


def test_a_later_job_begins_a_new_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"event": "committed", "st')
    log = SaveLog(path)
    log(Deleted(step=1, rank=0, at=1.0))
    log(Deleted(step=2, rank=0, at=1.0))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()[1:]] == [1, 2]
