"""The trace as a file: what its readers need, that no run touches another's, and what a killed process leaves."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.gangs import run_ranks
from tests.faults.gangwork import make_state


def save_some(path: Path, steps: range) -> sc.Trace:
    trace = sc.Trace(path)
    with sc.CheckpointManager(MemoryStorage(), sc.Gangs.local()) as checkpoints:
        checkpoints.subscribe(trace)
        for step in steps:
            checkpoints.save(step, {"weight": torch.ones(3)}).result()
    return trace


def steps_of(lines: list[dict[str, Any]]) -> set[int]:
    return {line["args"]["step"] for line in lines if line["ph"] == "X"}


def read_cut(content: str) -> list[dict[str, Any]]:
    """As viewers read an array of events that ends early: every event that is whole, to the first that is not."""
    lines: list[dict[str, Any]] = []
    decoder, at = json.JSONDecoder(), content.index("[") + 1
    while True:
        while at < len(content) and content[at] in ", \n":
            at += 1
        try:
            line, at = decoder.raw_decode(content, at)
        except json.JSONDecodeError:
            return lines
        lines.append(line)


def test_phases_of_a_thread_lie_beside_or_within_each_other_and_come_in_the_order_of_time(tmp_path: Path) -> None:
    place = MemoryStorage()

    def act(gangs: sc.Gangs) -> None:
        with sc.CheckpointManager(place, gangs) as checkpoints:
            checkpoints.subscribe(sc.Trace(tmp_path / "trace.json"))
            for step in (1, 2, 3):
                checkpoints.save(step, make_state(gangs.root.rank, step), replicated=("model",)).result()

    run_ranks(2, act)
    rows: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for line in json.loads((tmp_path / "trace.json").read_text()):
        if line["ph"] == "X":
            rows[line["pid"], line["tid"]].append(line)
    assert {rank for rank, _ in rows} == {0, 1}
    for row in rows.values():
        assert [line["ts"] for line in row] == sorted(line["ts"] for line in row)
        above: list[int] = []  # the ends of the phases that are still going on
        for line in row:
            while above and above[-1] <= line["ts"]:
                above.pop()
            end = line["ts"] + line["dur"]
            assert not above or end <= above[-1] + 1, line  # times since 1970 have a quarter of a microsecond
            above.append(end)


def test_times_are_microseconds_since_1970(tmp_path: Path) -> None:
    heard: list[sc.Event] = []
    path = tmp_path / "trace.json"
    with sc.CheckpointManager(MemoryStorage(), sc.Gangs.local()) as checkpoints:
        checkpoints.subscribe(sc.Trace(path))
        checkpoints.subscribe(heard.append)
        checkpoints.save(1, {"weight": torch.ones(3)}).result()
    (committed,) = [event for event in heard if isinstance(event, sc.Committed)]
    spans = {line["name"]: line for line in json.loads(path.read_text()) if line["ph"] == "X"}
    assert set(spans) == {phase.name for phase in committed.report.phases} | {"step 1"}
    for phase in committed.report.phases:
        assert spans[phase.name]["ts"] == pytest.approx(phase.began * 1e6, abs=1)
        assert spans[phase.name]["dur"] == pytest.approx(phase.seconds * 1e6, abs=1.5)


def test_no_run_touches_the_trace_of_an_earlier_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = tmp_path / "run.d" / "trace.json"
    wanted.parent.mkdir()
    with caplog.at_level(logging.INFO, logger="shardckpt"):
        assert save_some(wanted, range(1, 3)).path == str(wanted)
        assert "trace" not in caplog.text
        first = wanted.read_bytes()
        names = [Path(save_some(wanted, range(step, step + 1)).path).name for step in (7, 8)]
    assert names == ["trace.1.json", "trace.2.json"]
    assert wanted.read_bytes() == first
    assert steps_of(json.loads(wanted.read_text())) == {1, 2}
    assert steps_of(json.loads((wanted.parent / "trace.1.json").read_text())) == {7}
    assert steps_of(json.loads((wanted.parent / "trace.2.json").read_text())) == {8}
    assert f"{wanted} exists already; this run's trace is {wanted.parent / 'trace.2.json'}" in caplog.text


def test_a_write_that_fails_leaves_what_was_written_and_the_next_mends_the_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = save_some(path, range(1, 2))
    with open(path, "ab") as file:
        file.write(b',{"half": ' * 1000)  # as a full disk leaves it
    trace(sc.StopAgreed(step=4, rank=0, at=1.0, reason="told to"))
    lines = json.loads(path.read_text())
    assert lines[-1]["name"] == "step 4 stop agreed"
    assert steps_of(lines) == {1}


def test_a_trace_that_is_cut_anywhere_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    save_some(path, range(1, 4))
    content = path.read_text()
    whole = json.loads(content)
    found = [len(read_cut(content[:end])) for end in range(2, len(content), 7)]
    assert found == sorted(found)
    assert found[-1] >= len(whole) - 1
    assert read_cut(content[: len(content) // 2]) == whole[: found[len(found) // 2]]


_KILLED = """
import os, sys, threading, torch, shardckpt as sc
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.faults import GatedStorage, on
gated = GatedStorage(MemoryStorage(), on("put", "put_range", key="step_3"))
checkpoints = sc.CheckpointManager(gated, sc.Gangs.local())
traced = threading.Semaphore(0)
checkpoints.subscribe(sc.Trace(sys.argv[1]))
checkpoints.subscribe(lambda event: isinstance(event, sc.Committed) and traced.release())
for step in (1, 2):
    checkpoints.save(step, {"weight": torch.ones(3)}).result()
    traced.acquire()
checkpoints.save(3, {"weight": torch.ones(3)})
assert gated.reached.wait(60)
os.kill(os.getpid(), 9)
"""


def test_a_process_that_is_killed_in_a_save_leaves_a_whole_trace_of_those_before(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    ended = subprocess.run([sys.executable, "-c", _KILLED, str(path)], timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert steps_of(json.loads(path.read_text())) == {1, 2}
    assert Path(save_some(path, range(3, 4)).path).name == "trace.1.json"  # and who resumes does not overwrite it
