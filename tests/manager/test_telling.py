"""Callbacks of the user's own: what they are told, that a step stays while one is at work on it, and that whatever they
do harms no checkpoint and is reported."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import shardckpt as sc
from shardckpt.engine.events import listener
from shardckpt.storage.memory import MemoryStorage
from shardckpt.testing.faults import FailingStorage, on
from shardckpt.testing.gangs import run_ranks
from tests.faults.gangwork import make_state

BRIEF = timedelta(seconds=0.05)


def local(place: Any, **options: Any) -> sc.CheckpointManager:
    return sc.CheckpointManager(place, sc.Gangs.local(), **options)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def told(events: list[Any], count: int) -> bool:
    return len(events) == count


def test_each_hears_of_its_own_kind(tmp_path: Path) -> None:
    saved: list[Any] = []
    committed: list[Any] = []
    deleted: list[Any] = []
    with local(tmp_path, keep=sc.KeepLast(1)) as checkpoints:
        checkpoints.on_save(saved.append)
        checkpoints.on_commit(committed.append)
        checkpoints.on_delete(deleted.append)
        checkpoints.on_failure(saved.append)
        for step in (1, 2):
            checkpoints.save(step, make_state(0, step)).result()
            until(partial(told, committed, step))
        checkpoints.wait()
        until(partial(told, deleted, 1))
        checkpoints.delete_checkpoint(2, preserve_model=True)
    assert [(type(event).__name__, event.step) for event in saved] == [("SaveStarted", 1), ("SaveStarted", 2)]
    assert [event.url for event in committed] == [f"{tmp_path}/step_1", f"{tmp_path}/step_2"]
    assert committed[0].report.total_nbytes > 0
    assert [(event.step, event.url, event.model_kept) for event in deleted] == [
        (1, f"{tmp_path}/step_1", False),
        (2, f"{tmp_path}/step_2", True),
    ]
    assert deleted[0].reason == "not kept by KeepLast(n=1)"
    assert deleted[1].reason == "asked for by its number"


def test_on_rank_0_or_on_each_that_asks() -> None:
    place = MemoryStorage()

    def act(gangs: sc.Gangs) -> list[list[int]]:
        once: list[int] = []
        each: list[int] = []
        with sc.CheckpointManager(place, gangs) as checkpoints:
            checkpoints.on_commit(lambda event: once.append(event.rank))
            checkpoints.on_commit(lambda event: each.append(event.rank), each_rank=True)
            checkpoints.save(1, make_state(gangs.root.rank, 1)).result()
        return [once, each]

    assert run_ranks(2, act) == [[[0], [0]], [[], [1]]]


def test_an_upload_of_a_step_that_retention_is_about_to_delete(tmp_path: Path) -> None:
    """While it is at work on a step, or the step waits for it, the step stays; afterwards the next pruning takes it."""
    go = {1: threading.Event(), 2: threading.Event()}
    begun: list[int] = []

    def upload(event: sc.Committed) -> None:
        begun.append(event.step)
        if event.step in go:
            assert go[event.step].wait(20)
        shutil.copytree(event.url, tmp_path / "elsewhere" / f"step_{event.step}")

    with local(tmp_path / "run", keep=sc.KeepLast(1)) as checkpoints:
        checkpoints.on_commit(upload)
        for step in (1, 2, 3, 4):
            checkpoints.save(step, make_state(0, step)).result()
        checkpoints.wait()
        assert begun == [1]
        fates = checkpoints.prune(dry_run=True)
        why = f"{__name__}.{upload.__qualname__} is at work on it"
        assert [(fate.step, fate.kept, fate.reason) for fate in fates[:3]] == [(step, True, why) for step in (1, 2, 3)]
        go[1].set()
        until(lambda: begun == [1, 2])
        assert [fate.step for fate in checkpoints.prune() if not fate.kept] == [1]
        go[2].set()
        until(lambda: begun == [1, 2, 3, 4] and not checkpoints._events.held())
        checkpoints.save(5, make_state(0, 5)).result()
        until(lambda: checkpoints.steps() == [5])  # the save thread prunes after the commit
    with local(tmp_path / "elsewhere") as copies:
        assert copies.steps() == [1, 2, 3, 4, 5]
        for step in copies.steps():
            state = make_state(0, 0)
            copies.load(step, state)


def leave(event: sc.Event) -> None:
    sys.exit(f"at {event.step}")


def fail(event: sc.Event, text: str) -> None:
    raise ValueError(text)


@pytest.mark.parametrize(
    ("callback", "name", "error"),
    [
        (leave, "leave", "SystemExit: at 1"),
        (partial(fail, text="no network\nat all"), "fail", "ValueError: no network"),
    ],
)
def test_one_that_fails_is_logged_and_told_to_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, callback: Any, name: str, error: str
) -> None:
    """And it is called again, for the next."""
    heard: list[sc.Event] = []
    with local(MemoryStorage()) as checkpoints:
        checkpoints.on_commit(callback)
        checkpoints.subscribe(heard.append)
        checkpoints.subscribe(sc.SaveLog(tmp_path / "log"))
        for step in (1, 2):
            checkpoints.save(step, make_state(0, step)).result()
        until(lambda: len([event for event in heard if isinstance(event, sc.SubscriberFailed)]) == 2)
        assert checkpoints.steps() == [1, 2]
    (one, two) = [event for event in heard if isinstance(event, sc.SubscriberFailed)]
    assert (one.step, two.step) == (1, 2)
    assert (one.subscriber, one.heard, f"{one.kind}: {one.error}") == (f"{__name__}.{name}", "Committed", error)
    assert caplog.text.count(f"a subscriber failed: {__name__}.{name} failed at Committed") == 2
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    noted = [line for line in lines if line["event"] == "subscriber failed"]
    assert [line["step"] for line in noted] == [1, 2]
    assert noted[0]["error"] == f"{__name__}.{name}: {error}"


def test_subscribers_that_fail_at_each_other_come_to_an_end(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    def fail_always(event: sc.Event) -> None:
        calls.append(type(event).__name__)
        raise ValueError("always")

    with local(MemoryStorage()) as checkpoints:
        for _ in range(3):
            checkpoints.subscribe(fail_always)
        checkpoints.save(1, make_state(0, 1)).result()
    assert calls.count("Committed") == 3
    assert calls.count("SubscriberFailed") <= 3 * 2 * 4  # each of three, of each of the other two, at each of four


def test_one_that_hangs_is_reported_lets_its_steps_go_and_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    never, heard = threading.Event(), list[sc.Event]()
    with local(MemoryStorage(), keep=sc.KeepLast(1)) as checkpoints:
        checkpoints.on_commit(lambda event: never.wait(60), patience=BRIEF)
        checkpoints.subscribe(heard.append)
        checkpoints.save(1, make_state(0, 1)).result()
        until(lambda: not checkpoints._events.held())
        for step in (2, 3):
            checkpoints.save(step, make_state(0, step)).result()
        until(lambda: checkpoints.steps() == [3])  # the save thread prunes after the commit
        began = time.monotonic()
    assert time.monotonic() - began < 5
    (late,) = [event for event in heard if isinstance(event, sc.SubscriberFailed)]
    assert (late.step, late.kind) == (1, "TimeoutError")
    assert "it has not returned for 0.05 s" in late.error
    assert caplog.text.count("it has not returned for") == 1
    assert "is left behind" in caplog.text
    assert "with Committed of step 1, Committed of step 2, Committed of step 3" in caplog.text
    never.set()


def test_the_end_waits_for_an_upload_but_not_longer_than_the_budget_of_a_stop(caplog: pytest.LogCaptureFixture) -> None:
    for stopped in (False, True):
        never, done = threading.Event(), list[int]()

        def upload(event: sc.Committed, never: Any = never, done: Any = done, stopped: bool = stopped) -> None:
            never.wait(60 if stopped else 0.2)
            done.append(event.step)

        began = time.monotonic()
        with local(MemoryStorage()) as checkpoints:
            checkpoints.on_commit(upload)
            if stopped:
                checkpoints.stop_on(budget=timedelta(seconds=1.5))
                checkpoints.request_stop("it is time")
                assert checkpoints.should_stop(1)
            for step in (1, 2):
                checkpoints.save(step, make_state(0, step)).result()
        assert done == ([] if stopped else [1, 2])
        assert ("is left behind" in caplog.text) == stopped
        assert time.monotonic() - began < 10
        never.set()


def test_one_that_is_far_behind_misses_events_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "MOST", 2)
    go, heard = threading.Event(), list[int]()
    with local(MemoryStorage()) as checkpoints:
        checkpoints.on_commit(lambda event: (go.wait(20), heard.append(event.step)))
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(0, step)).result()
        go.set()
    assert heard == [1, 2]
    assert "is 2 events behind: it is not told of Committed of step 3" in caplog.text


def test_a_failed_save_and_scores_are_told() -> None:
    heard: list[Any] = []
    failures: list[Any] = []
    storage = FailingStorage(MemoryStorage(), on("put", key="step_2"))
    with local(storage, keep=sc.KeepBest(1, metric="loss")) as checkpoints:
        checkpoints.subscribe(heard.append)
        checkpoints.on_failure(failures.append)
        checkpoints.save(1, make_state(0, 1))
        checkpoints.save_score(0.5, step=1)  # waits for the commit, or comes after it
        checkpoints.wait()
        until(lambda: any(isinstance(event, sc.Measured) for event in heard))
        checkpoints.save_metrics({"loss": 2}, step=1)
        checkpoints.save(2, make_state(0, 2)).wait()
        checkpoints._tally.unseen()
    assert [(event.step, event.kind) for event in failures] == [(2, "CheckpointSaveError")]
    measured = [(event.step, dict(event.metrics)) for event in heard if isinstance(event, sc.Measured)]
    assert measured == [(1, {"score": 0.5}), (1, {"loss": 2.0})]
