"""What subscribers hear of saves, loads and deletions; that they harm nobody; and the trace that is made of it."""

from __future__ import annotations

import errno
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.events import stream
from shardckpt.engine.events.stream import EventStream
from shardckpt.engine.progress import SaveReport
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.faults import FailingStorage, GatedStorage, on
from shardckpt.testing.gangs import run_ranks
from tests.faults.gangwork import blank_state, make_state


def local(place: Any, **options: Any) -> sc.CheckpointManager:
    return sc.CheckpointManager(place, sc.Gangs.local(), **options)


def names(events: list[sc.Event]) -> list[tuple[str, int]]:
    return [(type(event).__name__, event.step) for event in events]


def test_a_life_as_it_is_told() -> None:
    heard: list[sc.Event] = []
    with local(MemoryStorage(), keep=sc.KeepLast(1)) as checkpoints:
        checkpoints.subscribe(heard.append)
        for step in (1, 2):
            checkpoints.save(step, make_state(0, step)).result()
        checkpoints.load(2, blank_state(0))
        checkpoints.save(3, make_state(0, 3))
        checkpoints.wait()
        while ("Deleted", 2) not in names(heard):  # by the save thread, after the commit
            time.sleep(0)
        checkpoints.delete_checkpoint(3)
    saved = ["SaveStarted", "Staged", "Written", "Committed"]
    of_saves = [told for told in names(heard) if told[0] in saved]
    assert of_saves == [(name, step) for step in (1, 2, 3) for name in saved]
    of_steps = [told for told in names(heard) if told[0] not in saved]
    assert sorted(of_steps) == [("Deleted", 1), ("Deleted", 2), ("Deleted", 3), ("Loaded", 2)]
    assert of_steps[-1] == ("Deleted", 3)
    assert [event.at for event in heard] == sorted(event.at for event in heard)
    committed = next(event for event in heard if isinstance(event, sc.Committed))
    written = next(event for event in heard if isinstance(event, sc.Written))
    assert committed.report.nbytes == written.nbytes > 0
    assert written.rate > 0
    with pytest.raises(AttributeError):
        committed.step = 5  # type: ignore[misc]


def test_the_report_says_what_each_phase_cost_and_who_was_slowest() -> None:
    """Rank 0 writes when rank 1 has begun to, and rank 1 ends when it has taken longer than rank 0 in all."""
    place, began = MemoryStorage(), time.perf_counter()
    gates = [GatedStorage(place, on("put", "put_range", key=f"rank_{rank}.pt")) for rank in range(2)]

    def act(gangs: sc.Gangs) -> Any:
        heard: list[sc.Event] = []
        rank, written = gangs.root.rank, threading.Event()
        with sc.CheckpointManager(gates[rank], gangs) as checkpoints:
            checkpoints.subscribe(heard.append)
            checkpoints.subscribe(lambda event: isinstance(event, sc.Written) and written.set())
            pending = checkpoints.save(1, make_state(rank, 1), replicated=("model",))
            if rank == 0:
                assert gates[1].reached.wait(20)
                gates[0].open_gate()
                assert written.wait(20)
                took = time.perf_counter() - began
                while time.perf_counter() < began + 2 * took:
                    time.sleep(0)
                gates[1].open_gate()
            pending.result()
        return pending.report, heard

    (zero, told), (one, told_too) = run_ranks(2, act)
    for report in (zero, one):
        assert report.slowest_rank == 1
        seconds = {phase.name: phase.seconds for phase in report.phases}
        assert set(seconds) == {"save", "stage", "meet", "seal", "put", "write", "commit"}
        assert report.write_s == seconds["write"] >= seconds["put"]
        assert report.commit_s == seconds["commit"]
        assert report.total_s > report.write_s
        assert report.write_rate > 0
    assert zero.slowest_s == one.slowest_s
    assert one.slowest_s >= sum(phase.seconds for phase in one.phases if phase.name in ("seal", "put"))
    (committed,) = [event for event in told if isinstance(event, sc.Committed)]
    (other,) = committed.others
    assert other.rank == 1
    assert other.began == one.began
    assert {phase.name for phase in other.phases} == {"save", "stage", "meet", "seal", "put"}
    (committed,) = [event for event in told_too if isinstance(event, sc.Committed)]
    assert committed.others == ()


def test_overlap_is_the_copy_less_what_training_stood_still() -> None:
    report = SaveReport(1)
    for name, began, ended in (("save", 0.0, 2.0), ("stage", 1.0, 6.0), ("wait", 5.0, 6.0), ("wait", 8.0, 9.0)):
        report.phases.append(sc.Phase(name, began, ended - began, "thread"))
    assert report.overlap_s == 3.0
    assert SaveReport(1).overlap_s == 0.0


def test_a_wait_before_the_optimizer_counts_as_stall_and_not_as_overlap() -> None:
    report = SaveReport(1)
    with report.phase("save"):
        pass
    with report.phase("wait"):
        pass
    assert [phase.name for phase in report.phases] == ["save", "wait"]
    assert report.stall_s == sum(phase.seconds for phase in report.phases)


def test_a_failure_is_told_with_what_it_cost_and_no_traceback() -> None:
    heard: list[sc.Event] = []
    storage = FailingStorage(MemoryStorage(), on("put", key=".pt"), error=lambda: OSError(errno.ENOSPC, "no space"))
    with local(storage) as checkpoints:
        checkpoints.subscribe(heard.append)
        pending = checkpoints.save(1, make_state(0, 1))
        pending.wait()
        assert pending.failure() is not None
        pending.unseen_error()
    failed = heard[-1]
    assert isinstance(failed, sc.SaveFailed)
    assert "no space" in failed.error
    assert "\n" not in failed.error
    assert failed.kind == "CheckpointSaveError"
    assert {"save", "put"} <= {phase.name for phase in failed.report.phases}


def test_a_subscriber_that_raises_is_logged_and_the_others_hear_all(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[sc.Event] = []

    def fail(event: sc.Event) -> None:
        raise ValueError("not my day")

    with local(MemoryStorage()) as checkpoints:
        checkpoints.subscribe(fail)
        checkpoints.subscribe(heard.append)
        checkpoints.save(1, make_state(0, 1)).result()
        assert checkpoints.steps() == [1]
    failures = [event for event in heard if isinstance(event, sc.SubscriberFailed)]
    assert [event.heard for event in failures] == ["SaveStarted", "Staged", "Written", "Committed"]
    assert [type(event).__name__ for event in heard if event not in failures] == [event.heard for event in failures]
    assert caplog.text.count("not my day") >= 4


def test_a_subscriber_that_hangs_holds_up_no_save(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(stream, "_PATIENCE", stream._PATIENCE / 100)
    never = threading.Event()
    with local(MemoryStorage()) as checkpoints:
        checkpoints.subscribe(lambda event: never.wait(60))
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(0, step)).result()
        assert checkpoints.steps() == [1, 2, 3]
    never.set()
    assert "left behind" in caplog.text


def test_one_that_returns_while_it_is_looked_at_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the clock and the look at what it was told; whoever tells must not fail for it."""
    heard: list[sc.Event] = []
    events = EventStream(0)
    events.subscribe(heard.append)
    monkeypatch.setattr(events._listeners[0], "_takes_too_long", lambda: True)
    events.tell(sc.Deleted, 1)
    events.close()
    assert names(heard) == [("Deleted", 1)]


def test_who_has_had_enough_hears_no_more() -> None:
    heard: list[sc.Event] = []
    events = EventStream(0)
    events.tell(sc.Deleted, 1)  # to nobody
    stop = events.subscribe(heard.append)
    events.tell(sc.Deleted, 2)
    events.close()
    assert names(heard) == [("Deleted", 2)]
    events = EventStream(0)
    heard.clear()
    stop = events.subscribe(heard.append)
    stop()
    events.tell(sc.Deleted, 3)
    events.close()
    assert heard == []


def read(path: Path) -> list[dict[str, Any]]:
    """What every reader of the format needs: a duration for each X, whole numbers, a process and a thread."""
    lines: list[dict[str, Any]] = json.loads(path.read_text())
    for line in lines:
        assert line["ph"] in "XMi"
        assert isinstance(line["pid"], int)
        assert isinstance(line["tid"], int)
        if line["ph"] != "M":
            assert isinstance(line["ts"], int)
        if line["ph"] == "X":
            assert isinstance(line["dur"], int)
            assert line["dur"] >= 0
    return lines


def test_a_trace_of_a_run_has_all_ranks_and_is_whole_after_each_save(tmp_path: Path) -> None:
    place, path = MemoryStorage(), tmp_path / "trace.json"

    def act(gangs: sc.Gangs) -> None:
        rank = gangs.root.rank
        with sc.CheckpointManager(place, gangs) as checkpoints:
            written, trace = threading.Event(), sc.Trace(path)

            def draw(event: sc.Event) -> None:
                trace(event)
                if isinstance(event, sc.Committed):
                    written.set()

            checkpoints.subscribe(draw)
            for step in (1, 2):
                checkpoints.save(step, make_state(rank, step), replicated=("model",)).result()
                if rank == 0:
                    assert written.wait(20)
                    assert f"step {step} committed" in {line["name"] for line in read(path)}
                    written.clear()
            checkpoints.load(2, blank_state(rank))

    run_ranks(2, act)
    lines = read(path)
    spans = [(line["pid"], line["name"], line["args"]["step"]) for line in lines if line["ph"] == "X"]
    for step in (1, 2):
        for rank in (0, 1):
            assert {(rank, name, step) for name in ("save", "stage", "seal", "put")} <= set(spans)
        assert (0, "commit", step) in spans
    assert (0, "load", 2) in spans
    assert len(spans) == len(set(spans))
    named = {(line["pid"], line["args"]["name"]) for line in lines if line["name"] == "process_name"}
    assert named == {(0, "rank 0"), (1, "rank 1")}


def test_a_trace_of_one_save(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with local(MemoryStorage()) as checkpoints:
        checkpoints.subscribe(sc.Trace(path, steps=[2]))
        for step in (1, 2, 3):
            checkpoints.save(step, {"weight": torch.ones(3)})
    assert {line["args"]["step"] for line in read(path) if line["ph"] == "X"} == {2}


def test_a_trace_that_cannot_be_written_harms_no_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), local(MemoryStorage()) as checkpoints:
        checkpoints.subscribe(sc.Trace(tmp_path / "nowhere" / "trace.json"))
        checkpoints.save(1, make_state(0, 1)).result()
    assert "a subscriber failed" in caplog.text
