"""Leftovers of jobs that died are swept once they have lain still for long enough, and nothing else is."""

from __future__ import annotations

from datetime import timedelta

from shardckpt.run.catalog import Catalog
from shardckpt.run.leftovers import DeadAttempts
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.faults import FailingStorage, on
from tests.run.making import commit, is_whole


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


def test_one_that_cannot_be_looked_into_keeps_no_other_from_going() -> None:
    """Another user's, in a root that several write to."""
    storage, clock = MemoryStorage(), Clock()
    for folder in (ALIVE, DEAD):
        storage.put(f"{folder}/rank_0.pt", [b"some"])
    closed = FailingStorage(storage, on("list", key=ALIVE), times=None, error=lambda: PermissionError("not yours"))
    attempts = DeadAttempts(Catalog(closed), grace=timedelta(seconds=100), clock=clock)
    for clock.now in (0, 100):
        swept = attempts.tidy()
    assert swept == [DEAD]
    assert storage.list() == [f"{ALIVE}/"]


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


def test_on_an_object_store_objects_and_uploads_of_dead_attempts_go() -> None:
    storage, clock = MemoryObjects(), Clock()
    in_force = commit(storage, 4)
    beside, begun, alive = "step_4/" + "a" * 20, "step_5/" + "b" * 20, "step_6/" + "c" * 20
    storage.put(f"{beside}/rank_0.pt", [b"of an attempt that lost"])
    storage.put("step_7/not an attempt/x", [b"foreign"])
    uploads = {key: storage.begin_upload(key) for key in (f"{begun}/rank_0.pt", f"{alive}/rank_0.pt", "foreign/x")}
    attempts = DeadAttempts(Catalog(storage), grace=timedelta(seconds=100), clock=clock)
    assert attempts.tidy() == []
    clock.now = 10
    storage.put(f"{alive}/rank_1.pt", [b"seen only at the next look, for this one would come too early"])
    assert attempts.tidy() == []
    clock.now = 100
    assert sorted(attempts.tidy()) == [beside, begun]
    assert sorted(key for key, _ in storage.list_uploads()) == sorted({*uploads} - {f"{begun}/rank_0.pt"})
    assert storage.list() == ["step_4/", "step_6/", "step_7/"]
    assert storage.list("step_4") == [f"{in_force}/", "manifest.json"]
    assert is_whole(storage, 4)
    clock.now = 200
    assert attempts.tidy() == [alive]
    assert [key for key, _ in storage.list_uploads()] == ["foreign/x"]


def test_probes_of_jobs_that_died_go_by_the_same_rule() -> None:
    storage, clock = MemoryObjects(), Clock()
    probe, foreign = ".probe-0123456789abcdef", ".probe-of-mine"
    for name in (probe, foreign):
        storage.put(name, [b"1"])
    for _ in range(3):  # as where the answer was lost, and it was asked for again
        storage.begin_upload(".probe-fedcba9876543210")
    attempts = DeadAttempts(Catalog(storage), grace=timedelta(seconds=100), clock=clock)
    for now in (0, 99):
        clock.now = now
        attempts.tidy()
        assert probe in storage.list()
        assert len(storage.list_uploads()) == 3
    clock.now = 101
    attempts.tidy()
    clock.now = 130
    attempts.tidy()
    assert storage.list() == [foreign]
    assert storage.list_uploads() == []
