from __future__ import annotations

import logging

import pytest

from shardckpt.errors import CheckpointLoadError
from shardckpt.format.layout import MANIFEST, aside_folder, new_attempt
from shardckpt.format.manifest import encode_manifest
from shardckpt.run.catalog import Catalog
from shardckpt.run.leftovers import sweep
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import Operation
from shardckpt.testing.faults import FailingStorage, on
from tests.run.faulty import DyingStorage, Killed, WatchedStorage, walk_files
from tests.run.making import commit, fill, is_whole, record_of, start_attempt


def files(storage: Storage) -> list[str]:
    return [key for name in storage.list() for key in walk_files(storage, name.rstrip("/"))]


def test_an_attempt_of_ones_own_that_failed_is_swept(storage: Storage) -> None:
    commit(storage, 4)
    commit(storage, 5)
    before = files(storage)
    own = {new_attempt(): 5, new_attempt(): 6}
    folders = [start_attempt(storage, step, attempt) for attempt, step in own.items()]
    assert sorted(sweep(Catalog(storage), own_attempts=own)) == sorted(folders)
    assert files(storage) == before


def test_an_attempt_of_somebody_else_is_left_alone(storage: Storage) -> None:
    commit(storage, 5)
    for step in (5, 6):
        start_attempt(storage, step, new_attempt())
    before = files(storage)
    assert sweep(Catalog(storage), own_attempts={}) == []
    assert files(storage) == before


def test_foreign_names_are_left_alone(storage: Storage) -> None:
    own = {"a" * 20: 5}
    for folder in ("step_5", f"step_5.{'a' * 20}.bak", f"step_005.{'a' * 20}.tmp", f"run/{'a' * 20}", "step_x.old"):
        fill(storage, folder)
    storage.put(f"step_6.{'a' * 20}.tmp", [b"a file, not a folder"])
    before = files(storage)
    sweep(Catalog(storage), own_attempts=own)
    assert files(storage) == before


def test_an_attempt_that_is_in_force_is_never_swept(storage: Storage) -> None:
    """It was taken for failed, and its commit had arrived."""
    attempt = commit(storage, 5)
    assert sweep(Catalog(storage), own_attempts={attempt: 5}) == []
    assert is_whole(storage, 5)


def test_with_a_damaged_record_nothing_is_known_of_an_attempt(objects: MemoryObjects) -> None:
    start_attempt(objects, 5, "a" * 20)
    objects.put(f"step_5/{MANIFEST}", [b"damaged"])
    before = files(objects)
    assert sweep(Catalog(objects), own_attempts={"a" * 20: 5}) == []
    assert files(objects) == before


def test_what_cannot_be_removed_is_logged_and_the_rest_is_swept(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"a" * 20: 5, "b" * 20: 6}
    folders = {attempt: start_attempt(storage, step, attempt) for attempt, step in own.items()}
    refusing = FailingStorage(storage, on("delete_tree", key="_5"), times=None)
    with caplog.at_level(logging.WARNING):
        assert sweep(Catalog(refusing), own_attempts=own) == [folders["b" * 20]]
    assert folders["a" * 20] in caplog.text
    sweep(Catalog(storage), own_attempts=own)
    assert files(storage) == []


def test_a_place_that_does_not_answer_is_told(renaming: MemoryStorage) -> None:
    with pytest.raises(CheckpointLoadError, match="injected"):
        sweep(Catalog(FailingStorage(renaming)), own_attempts={})


# File systems: what replacements leave


def test_a_replaced_step_is_swept_once_another_is_in_force(renaming: MemoryStorage) -> None:
    old = aside_folder(5, new_attempt(), "old")
    commit(renaming, 5, folder=old)
    catalog = Catalog(renaming)
    assert sweep(catalog, own_attempts={}) == []
    assert is_whole(renaming, 5)
    commit(renaming, 5)
    assert sweep(catalog, own_attempts={}) == [old]
    assert renaming.list() == ["step_5/"]
    assert is_whole(renaming, 5)


def test_a_replaced_step_stays_while_the_new_record_is_damaged(renaming: MemoryStorage) -> None:
    old = aside_folder(5, new_attempt(), "old")
    commit(renaming, 5, folder=old)
    renaming.put(f"step_5/{MANIFEST}", [b"damaged"])
    assert sweep(Catalog(renaming), own_attempts={}) == []


def test_a_replaced_folder_without_a_record_may_be_foreign_and_stays(renaming: MemoryStorage) -> None:
    """A commit sets aside whatever has the step's name, also another program's checkpoint."""
    attempt = new_attempt()
    for kind in ("old", "tmp"):
        fill(renaming, aside_folder(5, attempt, kind))
    commit(renaming, 5, attempt=attempt)
    assert sweep(Catalog(renaming), own_attempts={}) == []


def test_a_set_aside_folder_with_the_record_of_another_step_stays(renaming: MemoryStorage) -> None:
    commit(renaming, 5)
    old = aside_folder(5, new_attempt(), "old")
    commit(renaming, 6, folder=old)
    assert sweep(Catalog(renaming), own_attempts={}) == []


def test_what_was_exchanged_with_the_attempt_in_force_is_swept(renaming: MemoryStorage) -> None:
    commit(renaming, 5)
    attempt = new_attempt()
    tmp = aside_folder(5, attempt, "tmp")
    commit(renaming, 5, attempt=attempt, folder=tmp)
    assert sweep(Catalog(renaming), own_attempts={}) == [], "about to be committed, perhaps"
    renaming.exchange_folders("step_5", tmp)
    assert sweep(Catalog(renaming), own_attempts={}) == [tmp]
    assert Catalog(renaming).record(5)[1].attempt == attempt
    assert is_whole(renaming, 5)


def test_an_own_attempt_that_failed_with_its_record_written_is_swept(renaming: MemoryStorage) -> None:
    attempt = new_attempt()
    tmp = aside_folder(5, attempt, "tmp")
    commit(renaming, 5, attempt=attempt, folder=tmp)
    assert sweep(Catalog(renaming), own_attempts={attempt: 5}) == [tmp]
    assert renaming.list() == []


def test_a_dead_attempt_whose_record_was_cut_off_by_a_power_cut_is_swept(renaming: MemoryStorage) -> None:
    attempt = new_attempt()
    tmp = aside_folder(5, attempt, "tmp")
    fill(renaming, tmp)
    renaming.put(f"{tmp}/{MANIFEST}", [encode_manifest(record_of(5, attempt))[:200]])
    assert sweep(Catalog(renaming), own_attempts={}) == [], "of somebody else, perhaps"
    renaming.put(f"step_5/{MANIFEST}", [b"damaged"])
    assert sweep(Catalog(renaming), own_attempts={attempt: 5}) == [], "it may be all that there is of step 5"
    renaming.delete_tree("step_5")
    assert sweep(Catalog(renaming), own_attempts={attempt: 5}) == [tmp]
    commit(renaming, 6, folder=tmp)
    assert sweep(Catalog(renaming), own_attempts={attempt: 5}) == [], "a copy of another step"


def test_what_was_exchanged_with_an_attempt_that_was_itself_replaced_is_swept(renaming: MemoryStorage) -> None:
    tmp = aside_folder(5, new_attempt(), "tmp")
    commit(renaming, 5, folder=tmp)
    assert sweep(Catalog(renaming), own_attempts={}) == [], "nothing else is in force"
    commit(renaming, 5)
    assert sweep(Catalog(renaming), own_attempts={}) == [tmp]
    assert renaming.list() == ["step_5/"]


def test_a_sweep_that_dies_never_makes_a_failed_attempt_a_step(storage: Storage) -> None:
    for lives in range(1000):
        attempt = new_attempt()
        folder = start_attempt(storage, 5, attempt)
        storage.put(f"{folder}/{MANIFEST}", [encode_manifest(record_of(5, attempt))])
        try:
            sweep(Catalog(DyingStorage(storage, lives)), own_attempts={attempt: 5})
        except Killed:
            assert Catalog(storage).steps() == []
            storage.delete_tree(folder)
        else:
            break
    assert 5 < lives < 100


@pytest.mark.parametrize("at", range(20))
def test_a_commit_that_wakes_up_during_the_sweep_is_whole_or_fails(at: int) -> None:
    """Its attempt was given up, but it is only late: it renames before the sweep's operation number `at`."""
    storage = MemoryStorage("run")
    attempt = new_attempt()
    tmp = aside_folder(5, attempt, "tmp")
    commit(storage, 5, attempt=attempt, folder=tmp)
    number = iter(range(1000))

    def wake(_: Operation) -> None:
        if next(number) == at and f"{tmp}/" in storage.list():
            storage.rename_folder(tmp, "step_5")

    sweep(Catalog(WatchedStorage(storage, wake)), own_attempts={attempt: 5})
    if 5 in Catalog(storage).steps():
        assert is_whole(storage, 5)


@pytest.mark.parametrize("at", range(12))
def test_a_replacement_under_way_is_not_harmed(at: int) -> None:
    """The other gang goes one step on before each of the sweep's operations from number `at` on."""
    storage = MemoryStorage("run")
    commit(storage, 5)
    attempt = new_attempt()
    tmp, old = aside_folder(5, attempt, "tmp"), aside_folder(5, attempt, "old")
    commit(storage, 5, attempt=attempt, folder=tmp)
    todo = [lambda: storage.rename_folder("step_5", old), lambda: storage.rename_folder(tmp, "step_5")]
    number = iter(range(1000))

    def go_on(_: Operation) -> None:
        if todo and next(number) >= at:
            todo.pop(0)()
        assert is_whole(storage, 5)

    sweep(Catalog(WatchedStorage(storage, go_on)), own_attempts={})
    assert is_whole(storage, 5)
