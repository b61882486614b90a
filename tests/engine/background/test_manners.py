"""A limit of bytes per second, and threads that write after everybody else: what is set where, and what is not."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.background import manners
from shardckpt.engine.saving.stage import Staging
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.transfer import pacing
from shardckpt.storage.wrapping import Operation, StorageWrapper

T = TypeVar("T")

linux = pytest.mark.skipif(platform.system() != "Linux", reason="threads have their own niceness on Linux only")


@pytest.fixture(autouse=True)
def nothing_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manners, "_refused", set())


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def io_priority() -> int:
    get = manners._SYSCALLS[platform.machine()] + 1  # ioprio_get comes after ioprio_set
    return ctypes.CDLL(None).syscall(get, 1, 0)


class Watching(StorageWrapper):
    """Notes what the threads are like that write."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.seen: dict[str, set[tuple[int, int]]] = {}

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        self.seen.setdefault(operation.name, set()).add((niceness(), io_priority()))
        return call()


@linux
@pytest.mark.parametrize("io_class", ["idle", "best-effort"])
def test_who_writes_is_nice_and_nobody_else(monkeypatch: pytest.MonkeyPatch, io_class: Any) -> None:
    before = (niceness(), io_priority())
    nicer = (min(19, before[0] + 1), manners._CLASSES[io_class])
    seen: dict[str, set[Any]] = {"copy": set(), "seal": set()}
    real_copy, real_seal = Staging.copy, Staging.seal

    def copy(self: Staging, *args: Any) -> None:
        seen["copy"].add((niceness(), io_priority()))
        real_copy(self, *args)

    def seal(self: Staging) -> Any:
        seen["seal"].add((niceness(), io_priority()))
        return real_seal(self)

    monkeypatch.setattr(Staging, "copy", copy)
    monkeypatch.setattr(Staging, "seal", seal)
    storage = Watching(MemoryStorage())
    polite = sc.Manners(nice=1, io_class=io_class)
    with sc.CheckpointManager(storage, sc.Gangs.local(), manners=polite) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"weight": torch.ones(3)}).result()
    assert seen == {"copy": {before}, "seal": {nicer}}
    assert nicer in storage.seen["put"] | storage.seen.get("put_range", set())
    assert storage.seen["rename_folder"] == {before}
    assert (niceness(), io_priority()) == before


@linux
def test_threads_of_a_nice_thread_are_nice() -> None:
    found: list[int] = []

    def start_another() -> None:
        sc.Manners(nice=1).behave()
        thread = threading.Thread(target=lambda: found.append(niceness()))
        thread.start()
        thread.join()

    before, thread = niceness(), threading.Thread(target=start_another)
    thread.start()
    thread.join()
    assert found == [min(19, before + 1)]
    assert niceness() == before


def test_what_the_system_refuses_is_said_once_and_harms_no_save(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(1, "not here")

    monkeypatch.setattr(os, "setpriority", refuse)
    monkeypatch.setattr(manners, "_SYSCALLS", {})
    polite = sc.Manners(nice=3, io_class="idle")
    with (
        caplog.at_level(logging.WARNING),
        sc.CheckpointManager(MemoryStorage(), sc.Gangs.local(), manners=polite) as checkpoints,
    ):
        for step in (1, 2):
            checkpoints.save(step, {"weight": torch.ones(3)}).result()
    assert caplog.text.count("nice of the threads") == 2  # of nice and of ionice
    assert "not here" in caplog.text


@pytest.mark.parametrize("place", [MemoryStorage, MemoryObjects])
def test_a_save_goes_out_at_the_rate_and_is_whole(monkeypatch: pytest.MonkeyPatch, place: type) -> None:
    """By a clock that moves only while somebody waits: what was waited is bytes by rate."""
    waited: list[float] = []
    monkeypatch.setattr(pacing, "_now", lambda: sum(waited))
    monkeypatch.setattr(pacing, "_sleep", waited.append)
    weight, storage = torch.arange(300_000.0), place()
    with sc.CheckpointManager(storage, sc.Gangs.local(), manners=sc.Manners(rate=1e6)) as checkpoints:
        pending = checkpoints.save(1, {"weight": weight})
        pending.result()
        assert sum(waited) == pytest.approx(pending.report.nbytes / 1e6, rel=0.15)
        loaded = {"weight": torch.zeros_like(weight)}
        checkpoints.load(1, loaded)
    assert torch.equal(loaded["weight"], weight)


def test_a_paced_save_can_be_cancelled_between_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    go_on = threading.Event()

    def sleep(seconds: float) -> None:
        begun.set()
        go_on.wait(20)

    monkeypatch.setattr(pacing, "_sleep", sleep)
    with sc.CheckpointManager(MemoryStorage(), sc.Gangs.local(), manners=sc.Manners(rate=1e5)) as checkpoints:
        pending = checkpoints.save(1, {"weight": torch.ones(300_000)})
        assert begun.wait(20)
        pending.cancel()
        go_on.set()
        with pytest.raises(sc.CheckpointSaveError, match="cancelled"):
            pending.result()
        assert checkpoints.steps() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": 0}, "bytes per second"),
        ({"rate": float("nan")}, "bytes per second"),
        ({"nice": 20}, "0 to 19"),
        ({"nice": -1}, "0 to 19"),
        ({"io_class": "realtime"}, "best-effort, idle"),
    ],
)
def test_bad_manners(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sc.Manners(**options)
