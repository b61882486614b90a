from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from shardckpt.engine.committing.commit import commit_attempt
from shardckpt.errors import CheckpointDamagedError, CheckpointError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.layout import MANIFEST, aside_folder, new_attempt, step_folder
from shardckpt.format.manifest import encode_manifest
from shardckpt.run.catalog import Catalog, Entry
from shardckpt.run.leftovers import sweep
from shardckpt.run.requests import AT_ONCE, each
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import Operation
from shardckpt.testing.faults import FailingStorage, RecordingStorage
from tests.run.faulty import ClumsyStorage, DyingStorage, Killed, WatchedStorage
from tests.run.making import commit, fill, is_whole, record_of, start_attempt


def test_an_empty_place_has_no_steps(storage: Storage) -> None:
    catalog = Catalog(storage)
    assert catalog.steps() == []
    assert catalog.latest() is None
    with pytest.raises(CheckpointNotFoundError, match="step 7") as raised:
        catalog.entry(7)
    assert raised.value.step == 7


def test_steps_ascend_by_number_and_not_by_name(storage: Storage) -> None:
    for step in (1000, 900, 0, 10):
        commit(storage, step)
    catalog = Catalog(storage)
    assert catalog.steps() == [0, 10, 900, 1000]
    assert [entry.step for entry in catalog.newest_first()] == [1000, 900, 10, 0]
    latest = catalog.latest()
    assert latest is not None
    assert latest == catalog.entry(1000) == catalog.entries()[-1]


def test_a_step_without_a_record_does_not_count(storage: Storage) -> None:
    commit(storage, 1)
    start_attempt(storage, 1, new_attempt())
    start_attempt(storage, 2, new_attempt())
    fill(storage, step_folder(3))
    catalog = Catalog(storage)
    assert catalog.steps() == [1]
    assert [entry.step for entry in catalog.newest_first()] == [1]
    for step in (2, 3):
        with pytest.raises(CheckpointNotFoundError):
            catalog.record(step)


def test_foreign_names_are_passed_over(storage: Storage) -> None:
    commit(storage, 7)
    record = encode_manifest(record_of(7, new_attempt()))
    for folder in ("step_foo", "step_007", "step_-1", "Step_8", "step_8 ", "step_9.backup", "step_10.x.old", "latest"):
        storage.put(f"{folder}/{MANIFEST}", [record])
    storage.put("step_11", [b"a file"])
    storage.put(MANIFEST, [record])
    assert Catalog(storage).steps() == [7]
    with pytest.raises(CheckpointNotFoundError):
        Catalog(storage).entry(11)


def test_a_link_is_not_a_step(tmp_path: Path) -> None:
    """It may lead anywhere; links are for people."""
    storage = LocalStorage(tmp_path)
    commit(storage, 7)
    for link in ("step_9", "latest", f"step_8.{new_attempt()}.old"):
        (tmp_path / link).symlink_to("step_7")
    assert Catalog(storage).steps() == [7]


def test_the_record_comes_with_the_folder_of_its_files(storage: Storage) -> None:
    attempt = commit(storage, 5)
    folder, manifest = Catalog(storage).record(5)
    assert (folder, manifest.step, manifest.attempt) == ("step_5", 5, attempt)
    assert Catalog(storage).record(Catalog(storage).entry(5)) == (folder, manifest)
    assert is_whole(storage, 5)


def damaged_records() -> dict[str, Callable[[bytes], bytes]]:
    return {
        "empty": lambda _: b"",
        "truncated": lambda record: record[:-10],
        "one bit": lambda record: record.replace(b'"step": 5', b'"step": 4'),
        "of another step": lambda _: encode_manifest(record_of(6, new_attempt())),
        "of another tool": lambda _: b'{"model": "gpt"}',
    }


@pytest.mark.parametrize("damage", damaged_records())
def test_a_damaged_record_is_listed_and_refused_with_the_place_and_what_to_do(storage: Storage, damage: str) -> None:
    commit(storage, 5)
    key = f"step_5/{MANIFEST}"
    record = storage.read(key)
    storage.delete([key])
    storage.put(key, [damaged_records()[damage](record)])
    catalog = Catalog(storage)
    assert catalog.steps() == [5]
    with pytest.raises(CheckpointDamagedError) as raised:
        catalog.record(5)
    assert raised.value.step == 5
    message = str(raised.value)
    assert storage.url in message
    assert key in message
    assert ("Rename it to 'step_6'" if damage == "of another step" else "Load another step") in message


def test_a_place_that_does_not_answer_is_not_taken_for_an_empty_one(storage: Storage) -> None:
    commit(storage, 5)
    entry = Catalog(storage).entry(5)
    refusing = Catalog(FailingStorage(storage, times=None))
    ask: list[Callable[[], object]] = [
        refusing.steps,
        refusing.latest,
        lambda: refusing.entry(5),
        lambda: refusing.entry(6),
        lambda: refusing.record(entry),
    ]
    for question in ask:
        with pytest.raises(CheckpointError, match="injected") as raised:
            question()
        assert type(raised.value) is CheckpointLoadError


# The two renames of a replacement on a file system


def test_a_step_set_aside_is_in_force_exactly_while_no_other_has_its_name(renaming: MemoryStorage) -> None:
    old, new = commit(renaming, 5), new_attempt()
    aside = aside_folder(5, new, "old")
    renaming.rename_folder("step_5", aside)
    catalog = Catalog(renaming)
    assert catalog.entries() == [Entry(5, aside, aside)] == [catalog.entry(5)] == [catalog.latest()]
    assert catalog.record(5)[1].attempt == old
    fill(renaming, "step_5")
    assert catalog.entry(5).folder == aside, "a folder without a record does not take over"
    renaming.delete_tree("step_5")
    commit(renaming, 5, attempt=new)
    assert catalog.entries() == [Entry(5, "step_5", "step_5")] == [catalog.entry(5)] == [catalog.latest()]
    assert catalog.record(5)[1].attempt == new


def test_the_newest_may_be_one_that_was_set_aside(renaming: MemoryStorage) -> None:
    for step in (4, 5, 6):
        commit(renaming, step)
    aside = aside_folder(6, new_attempt(), "old")
    renaming.rename_folder("step_6", aside)
    assert [entry.folder for entry in Catalog(renaming).newest_first()] == [aside, "step_5", "step_4"]


def test_of_several_set_aside_the_one_committed_last_is_in_force(renaming: MemoryStorage) -> None:
    folders = [aside_folder(5, new_attempt(), "old") for _ in range(4)]
    days = ["2026-01-02", "2026-01-03", "2026-01-01"]
    for folder, day in zip(folders, days, strict=False):
        commit(renaming, 5, folder=folder, created=f"{day}T00:00:00Z")
    renaming.put(f"{folders[3]}/{MANIFEST}", [b"damaged"])
    assert Catalog(renaming).record(5)[0] == folders[1]


def test_an_attempt_with_a_record_is_not_in_force(renaming: MemoryStorage) -> None:
    commit(renaming, 5, folder=aside_folder(5, new_attempt(), "tmp"))
    assert Catalog(renaming).steps() == []


@pytest.mark.parametrize("exchanges", [False, True])
def test_a_commit_that_dies_at_any_point_leaves_the_old_step_or_the_new_one_in_force(exchanges: bool) -> None:
    """The engine's own commit, replacing a step; afterwards a sweep harms nothing."""
    for lives in range(100):
        storage = MemoryStorage("run")
        old, new = commit(storage, 5), new_attempt()
        known, tmp = storage.read("step_5/manifest.json"), start_attempt(storage, 5, new)
        dying = (DyingStorage if exchanges else ClumsyStorage)(storage, lives)
        try:
            commit_attempt(dying, tmp, record_of(5, new), known=known)
        except Killed:
            assert Catalog(storage).record(5)[1].attempt in (old, new)
            sweep(Catalog(storage), own_attempts={new: 5})
            assert is_whole(storage, 5)
        else:
            break
    assert 5 < lives < 100
    assert Catalog(storage).record(5)[1].attempt == new


@pytest.mark.parametrize("at", range(7))
def test_a_reader_beside_a_replacement_always_finds_the_step(renaming: MemoryStorage, at: int) -> None:
    """Another process goes one step on (rename, rename, delete) before the reader's operations `at`, `at + 1`, ..."""
    commit(renaming, 4)
    commit(renaming, 5)
    attempt = new_attempt()
    tmp, old = aside_folder(5, attempt, "tmp"), aside_folder(5, attempt, "old")
    commit(renaming, 5, folder=tmp, attempt=attempt)
    questions: list[Callable[[Catalog], int]] = [
        lambda catalog: catalog.record(5)[1].step,
        lambda catalog: catalog.record(next(catalog.newest_first()))[1].step,
        lambda catalog: catalog.steps()[-1],
    ]
    for question in questions:
        for gap in (1, 2):
            place = copy_of(renaming)
            todo: list[Callable[[], None]] = [
                partial(place.rename_folder, "step_5", old),
                partial(place.rename_folder, tmp, "step_5"),
                partial(place.delete_tree, old),
            ]
            catalog = Catalog(WatchedStorage(place, acting(todo, at=at, gap=gap)))
            assert question(catalog) == 5


def acting(todo: list[Callable[[], None]], *, at: int, gap: int) -> Callable[[Operation], None]:
    seen, lock = iter(range(1000)), threading.Lock()

    def before(_: Operation) -> None:
        with lock:
            number = next(seen)
            if todo and number >= at and (number - at) % gap == 0:
                todo.pop(0)()

    return before


def copy_of(storage: MemoryStorage) -> MemoryStorage:
    copy = MemoryStorage("copy")
    for folder in storage.list():
        for name in storage.list(folder):
            if not name.endswith("/"):
                copy.put(f"{folder}{name}", [storage.read(f"{folder}{name}")])
    return copy


# Object stores


def test_the_attempt_in_force_is_told_apart_from_leftovers(objects: MemoryObjects) -> None:
    attempt = commit(objects, 5)
    assert Catalog(objects).entry(5) == Entry(5, "step_5", f"step_5/{attempt}")
    for other in ("0" * 20, "z" * 20):
        start_attempt(objects, 5, other)
    assert Catalog(objects).entry(5) == Entry(5, "step_5", f"step_5/{attempt}")
    objects.delete([f"step_5/{MANIFEST}"])
    objects.put(f"step_5/{MANIFEST}", [b"damaged"])
    assert Catalog(objects).entry(5) == Entry(5, "step_5", "step_5")


# Requests


def test_a_listing_costs_one_request_for_the_root_and_one_for_each_step(storage: Storage) -> None:
    for step in range(10):
        commit(storage, step)
    questions: list[tuple[Callable[[Catalog], object], int]] = [
        (Catalog.entries, 11),
        (Catalog.latest, 2),
        (lambda catalog: catalog.record(3), 2),
    ]
    for question, requests in questions:
        recording = RecordingStorage(storage)
        question(Catalog(recording))
        assert len(recording.operations) == requests


def test_requests_run_side_by_side_and_leave_no_thread_behind() -> None:
    before = threading.active_count()
    all_there = threading.Barrier(AT_ONCE)

    def meet(item: int) -> int:
        all_there.wait(timeout=30)  # passes only if as many run at once
        return item * item

    assert each(meet, range(3 * AT_ONCE)) == [item * item for item in range(3 * AT_ONCE)]
    assert threading.active_count() == before


def test_the_first_error_of_many_requests_is_raised_and_the_rest_is_left() -> None:
    begun: list[int] = []

    def fail(item: int) -> None:
        begun.append(item)
        raise FileNotFoundError(item)

    with pytest.raises(FileNotFoundError, match=r"^0$"):
        each(fail, range(10_000))
    assert len(begun) < 10_000
