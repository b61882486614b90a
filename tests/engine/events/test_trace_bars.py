"""One bar for each save in the trace, on each rank; and all of it as the Trace Event Format is documented."""

from __future__ import annotations

import errno
import json
from collections import Counter, defaultdict
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.progress import SaveReport
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.faults import FailingStorage, GatedStorage, on
from shardckpt.testing.gangs import run_ranks
from tests.faults.gangwork import make_state

LIMIT = timedelta(seconds=30)
PER_KIND = {"X": {"ts", "dur"}, "i": {"ts", "s"}, "M": {"args"}}
"""What events need beside name, phase, process and thread: complete events, instant ones, metadata."""
METADATA = {"process_name": ("name", str), "thread_name": ("name", str), "thread_sort_index": ("sort_index", int)}

Lines = list[dict[str, Any]]


def read(path: Path) -> Lines:
    """All events, each of which is as the format says."""
    lines: Lines = json.loads(path.read_text())
    assert isinstance(lines, list)
    named: Counter[tuple[str, int, int]] = Counter()
    for line in lines:
        assert {"name", "ph", "pid", "tid", *PER_KIND[line["ph"]]} <= set(line), line
        assert isinstance(line["name"], str)
        assert line["name"]
        for number in ("pid", "tid", "ts", "dur"):
            assert type(line.get(number, 0)) is int
            assert line.get(number, 0) >= 0
        assert isinstance(line.get("args", {}), dict)
        if line["ph"] == "i":
            assert line["s"] in ("g", "p", "t")
        if line["ph"] == "M":
            key, kind = METADATA[line["name"]]
            assert type(line["args"][key]) is kind
            named[line["name"], line["pid"], line["tid"] if line["name"] != "process_name" else 0] += 1
    for pid, tid in {(line["pid"], line["tid"]) for line in lines if line["ph"] == "X"}:
        assert named["process_name", pid, 0] == 1
        assert named["thread_name", pid, tid] == named["thread_sort_index", pid, tid] == 1
    check_nesting(lines)
    return lines


def check_nesting(lines: Lines) -> None:
    """Complete events of a thread lie beside or within each other, to the microsecond."""
    rows: dict[tuple[int, int], Lines] = defaultdict(list)
    for line in lines:
        if line["ph"] == "X":
            rows[line["pid"], line["tid"]].append(line)
    for row in rows.values():
        for one, other in combinations(sorted(row, key=lambda line: (line["ts"], -line["dur"])), 2):
            end = one["ts"] + one["dur"]
            assert other["ts"] >= end or other["ts"] + other["dur"] <= end, (one, other)


def rows_of(lines: Lines) -> dict[tuple[int, int], str]:
    return {(line["pid"], line["tid"]): line["args"]["name"] for line in lines if line["name"] == "thread_name"}


def bars_of(lines: Lines) -> Lines:
    rows = rows_of(lines)
    return [line for line in lines if line["ph"] == "X" and rows[line["pid"], line["tid"]].startswith("saves")]


def outcomes(lines: Lines) -> list[tuple[int, int, str]]:
    return sorted((line["pid"], line["args"]["step"], line["args"]["outcome"]) for line in bars_of(lines))


def check_bars_enclose(lines: Lines) -> None:
    """Every phase of a save lies within the bar of that save and rank; of a step that is saved once."""
    bars = {(bar["pid"], bar["args"]["step"]): bar for bar in bars_of(lines)}
    for line in lines:
        if line["ph"] == "X" and line["name"] != "load":
            bar = bars[line["pid"], line["args"]["step"]]
            assert bar["ts"] <= line["ts"], (bar, line)
            assert line["ts"] + line["dur"] <= bar["ts"] + bar["dur"], (bar, line)


def test_every_save_has_one_bar_on_every_rank_however_it_ended(tmp_path: Path) -> None:
    """Step 2 cannot be written by rank 1."""
    place = MemoryStorage()
    full = FailingStorage(
        place, on("put", "put_range", key="step_2."), error=lambda: OSError(errno.ENOSPC, "no space"), times=None
    )
    called: list[dict[int, float]] = [{}, {}]

    def act(gangs: sc.Gangs) -> None:
        rank = gangs.root.rank
        with sc.CheckpointManager(full if rank else place, gangs) as checkpoints:
            checkpoints.subscribe(sc.Trace(tmp_path / "trace.json"))
            for step in (1, 2, 3):
                pending = checkpoints.save(step, make_state(rank, step), replicated=("model",))
                assert pending.wait(LIMIT)
                pending.mark_seen()
                called[rank][step] = pending.report.began

    run_ranks(2, act)
    lines = read(tmp_path / "trace.json")
    expected = {1: "committed", 2: "failed", 3: "committed"}
    assert outcomes(lines) == [(rank, step, expected[step]) for rank in (0, 1) for step in (1, 2, 3)]
    check_bars_enclose(lines)
    phases = {(line["pid"], line["args"]["step"], line["name"]) for line in lines if line["ph"] == "X"}
    assert {(rank, step, "put") for rank in (0, 1) for step in (1, 3)} | {(0, 2, "put")} <= phases
    ends = {line["name"].removeprefix("step "): line["ts"] for line in lines if line["ph"] == "i"}
    for bar in bars_of(lines):
        step = bar["args"]["step"]
        assert bar["name"] == f"step {step}"
        assert bar["ts"] == pytest.approx(called[bar["pid"]][step] * 1e6, abs=1)
        assert bar["ts"] + bar["dur"] == ends[f"{step} {expected[step]}"]
        assert ("no space" in bar["args"].get("error", "")) == (step == 2)


def test_saves_under_way_at_the_same_time_have_a_row_each(tmp_path: Path) -> None:
    """Two of them, then one alone."""
    gated = GatedStorage(MemoryStorage(), on("put", key="step_1."))
    with sc.CheckpointManager(gated, sc.Gangs.local(), saving=sc.SavePolicy(in_flight=2)) as checkpoints:
        checkpoints.subscribe(sc.Trace(tmp_path / "trace.json"))
        checkpoints.save(1, {"w": torch.ones(3)})
        assert gated.reached.wait(LIMIT.total_seconds())
        checkpoints.save(2, {"w": torch.ones(3)})
        gated.open_gate()
        checkpoints.wait()
        checkpoints.save(3, {"w": torch.ones(3)}).result(LIMIT)
    lines = read(tmp_path / "trace.json")
    check_bars_enclose(lines)
    rows = rows_of(lines)
    assert {bar["args"]["step"]: rows[bar["pid"], bar["tid"]] for bar in bars_of(lines)} == {
        1: "saves",
        2: "saves (2)",
        3: "saves",
    }
    places = {rows[n["pid"], n["tid"]]: n["args"]["sort_index"] for n in lines if n["name"] == "thread_sort_index"}
    assert sorted(places, key=lambda name: places[name])[:2] == ["saves", "saves (2)"]


def test_a_save_that_is_skipped_has_a_bar_that_says_so(tmp_path: Path) -> None:
    gated = GatedStorage(MemoryStorage(), on("put", key="step_1."))
    with sc.CheckpointManager(gated, sc.Gangs.local(), saving=sc.SavePolicy(when_busy="skip")) as checkpoints:
        checkpoints.subscribe(sc.Trace(tmp_path / "trace.json"))
        checkpoints.save(1, {"w": torch.ones(3)})
        assert gated.reached.wait(LIMIT.total_seconds())
        skipped = checkpoints.save(2, {"w": torch.ones(3)})
        gated.open_gate()
        assert skipped.wait(LIMIT)
    lines = read(tmp_path / "trace.json")
    check_bars_enclose(lines)
    assert outcomes(lines) == [(0, 1, "committed"), (0, 2, "skipped")]
    assert "step 1 is still being saved" in bars_of(lines)[1]["args"]["reason"]


def test_what_nobody_knows_and_clocks_that_differ(tmp_path: Path) -> None:
    """Of rank 1 the clock is a minute ahead; here it was set back while the save was under way."""
    trace = sc.Trace(tmp_path / "trace.json")
    report = SaveReport(1, began=100.0)
    report.phases += [sc.Phase("save", 99.9, 0.5, "main"), sc.Phase("commit", 101.0, 4.0, "shardckpt-save")]
    ahead = sc.OtherRank(1, 160.0, (sc.Phase("put", 160.5, 1.0, "shardckpt-storage"),))
    behind = sc.OtherRank(2, 40.0)
    failed: dict[str, Any] = {"kind": "CommitUnknownError", "error": "who knows", "report": report}
    trace(sc.SaveFailed(step=1, rank=0, at=103.0, others=(ahead, behind), **failed))
    lines = read(tmp_path / "trace.json")
    check_bars_enclose(lines)
    assert outcomes(lines) == [(rank, 1, "unknown") for rank in (0, 1, 2)]
    spans = {bar["pid"]: (bar["ts"], bar["dur"]) for bar in bars_of(lines)}
    assert spans == {0: (99_900_000, 5_100_000), 1: (160_000_000, 1_500_000), 2: (40_000_000, 63_000_000)}


def test_the_check_of_nesting_finds_what_does_not_nest() -> None:
    lines: Lines = [{"ph": "X", "pid": 0, "tid": 1, "ts": ts, "dur": 10} for ts in (0, 5)]
    with pytest.raises(AssertionError):
        check_nesting(lines)
