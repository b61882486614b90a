"""Leftovers of jobs that died are swept once they have lain still for long enough, and nothing else is."""

from __future__ import annotations

from datetime import timedelta

from shardckpt.run.catalog import Catalog
from shardckpt.run.leftovers import DeadAttempts
from shardckpt.storage.memory import MemoryStorage


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


DEAD, ALIVE = "step_5.0123456789abcdef.tmp", "step_6.fedcba9876543210.tmp"


def test_only_what_does_not_change_for_the_whole_grace_goes() -> None:
    storage, clock = MemoryStorage(), Clock()
    for folder in (DEAD, ALIVE, "step_7.mine.tmp", "step_8.0123456789abcdef.old"):
        storage.put(f"{folder}/rank_0.pt", [b"some"])
    attempts = DeadAttempts(Catalog(storage), grace=timedelta(seconds=100), clock=clock)
    assert attempts.tidy() == []
    clock.now = 99
    storage.put(f"{ALIVE}/rank_1.pt", [b"more"])
    assert attempts.tidy() == []
    clock.now = 100
    assert attempts.tidy() == [DEAD]
    assert f"{DEAD}/" not in storage.list()
    clock.now = 198
    assert attempts.tidy() == []
    clock.now = 199
    assert attempts.tidy() == [ALIVE]
    assert storage.list() == ["step_7.mine.tmp/", "step_8.0123456789abcdef.old/"]


def test_a_long_pause_between_two_looks_counts_only_if_it_was_seen_before() -> None:
    storage, clock = MemoryStorage(), Clock()
    attempts = DeadAttempts(Catalog(storage), grace=timedelta(seconds=100), clock=clock)
    attempts.tidy()
    clock.now = 1000
    storage.put(f"{ALIVE}/rank_0.pt", [b"just begun"])
    assert attempts.tidy() == []
    storage.put(f"{ALIVE}/rank_1.pt", [b"going on"])
    clock.now = 2000
    assert attempts.tidy() == []
    assert f"{ALIVE}/" in storage.list()
