from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import pytest

from shardckpt.errors import CheckpointDeleteError, CheckpointNotFoundError
from shardckpt.format.layout import MANIFEST, aside_folder, new_attempt
from shardckpt.run.catalog import Catalog, read_record
from shardckpt.run.deletion import delete_step
from shardckpt.run.leftovers import sweep
from shardckpt.run.scores import write_score
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import Operation, StorageWrapper
from shardckpt.testing.faults import FailingStorage, RecordingStorage
from tests.run.faulty import READING, DyingStorage, Killed, PowerCutStorage, walk_files
from tests.run.making import commit, is_whole, start_attempt

T = TypeVar("T")


def delete(storage: Storage, step: int) -> None:
    entry = Catalog(storage).entry(step)
    delete_step(storage, entry, manifest=read_record(storage, entry))


def make_run(storage: Storage) -> None:
    """Steps 4 and 5, both scored, and a file of somebody's in step 5."""
    for step in (4, 5):
        commit(storage, step)
        write_score(storage, Catalog(storage).entry(step), score=step / 10)
    storage.put(f"{Catalog(storage).entry(5).attempt_folder}/samples/1.txt", [b"text"])


def whole_or_none(storage: Storage, step: int) -> bool:
    """Whether the step is there; it must then be whole."""
    if step not in Catalog(storage).steps():
        with pytest.raises(CheckpointNotFoundError):
            Catalog(storage).record(step)
        return False
    assert is_whole(storage, step)
    return True


def test_all_that_belongs_to_the_step_goes_and_nothing_else(storage: Storage) -> None:
    make_run(storage)
    others = walk_files(storage, "step_4")
    delete(storage, 5)
    assert Catalog(storage).steps() == [4]
    assert [name for name in storage.list() if "5" in name] == []
    assert walk_files(storage, "step_4") == others


def test_a_step_with_a_damaged_record_can_be_deleted(storage: Storage) -> None:
    make_run(storage)
    storage.delete([f"step_5/{MANIFEST}"])
    storage.put(f"step_5/{MANIFEST}", [b"damaged"])
    delete_step(storage, Catalog(storage).entry(5))
    assert Catalog(storage).steps() == [4]
    assert storage.list() == ["step_4/"]


def test_the_record_goes_first_and_for_good(storage: Storage) -> None:
    make_run(storage)
    recording = RecordingStorage(storage)
    delete(recording, 5)
    changes = [done for done in recording.operations if done.name not in {*READING, "rename_folder"}]
    assert [key.rpartition("/")[2] for key in changes[0].keys] == [MANIFEST]
    names = [done.name for done in changes]
    if isinstance(storage, RenamingStorage):
        assert names == ["delete", "sync_folder", "delete_tree"]
    else:
        assert names == ["delete", "delete", "delete_tree"]
        assert len(changes[1].keys) == 5, "the files of the record and the score, by one bulk request"


@pytest.mark.parametrize("backwards", [False, True])
def test_a_crash_at_any_point_leaves_a_whole_step_or_none(storage: Storage, backwards: bool) -> None:
    attempt = None
    for lives in range(1000):
        if Catalog(storage).steps() != [4, 5]:
            storage.delete_tree("step_4")
            storage.delete_tree("step_5")
            make_run(storage)
        attempt = Catalog(storage).record(5)[1].attempt
        try:
            delete(DyingStorage(storage, lives, backwards=backwards), 5)
        except Killed:
            there = whole_or_none(storage, 5)
        else:
            break
        assert whole_or_none(storage, 4)
        if there:
            assert Catalog(storage).record(5)[1].attempt == attempt
            assert whole_or_none(storage, 5)
    else:
        pytest.fail("the deletion never ended")
    assert lives > 8, "there were that many points to die at"
    assert not whole_or_none(storage, 5)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_power_cut_at_any_point_leaves_a_whole_step_or_none(backwards: bool) -> None:
    died = 0
    for lives in range(1000):
        storage = MemoryStorage("run")
        make_run(storage)
        cut = PowerCutStorage(storage, lives, backwards=backwards)
        try:
            delete(cut, 5)
        except Killed:
            died += 1
            cut.restart()
            whole_or_none(storage, 5)
        else:
            break
    assert died > 8


def test_after_a_crash_at_any_point_the_deletion_can_be_ended_and_the_step_saved_anew() -> None:
    for again in (False, True):
        for lives in range(1000):
            storage = MemoryStorage("run")
            make_run(storage)
            ended = False
            with suppress(Killed):
                delete(DyingStorage(storage, lives), 5)
                ended = True
            if again:
                if "step_5/" not in storage.list():
                    commit(storage, 5)
            else:
                with suppress(CheckpointNotFoundError):
                    delete(storage, 5)
            sweep(Catalog(storage), own_attempts={})
            assert storage.list() == (["step_4/", "step_5/"] if again else ["step_4/"])
            assert whole_or_none(storage, 5) == again
            if ended:
                break
        assert lives > 8


@pytest.mark.parametrize("lost", [False, True], ids=["refused", "answer lost"])
@pytest.mark.parametrize("nth", range(1, 7))
def test_an_error_at_any_point_is_told_and_the_step_is_whole_or_not_listed(
    storage: Storage, nth: int, lost: bool
) -> None:
    make_run(storage)
    entry = Catalog(storage).entry(5)
    manifest = read_record(storage, entry)
    failing = FailingStorage(storage, nth=nth, after=lost)
    caught: CheckpointDeleteError | None = None
    try:
        delete_step(failing, entry, manifest=manifest)
    except CheckpointDeleteError as error:
        caught = error
    there = whole_or_none(storage, 5)
    assert failing.failed == (caught is not None), "every error is told"
    if caught is None:
        assert not there
    else:
        assert caught.step == 5
        assert "injected" in str(caught)
        assert storage.url in str(caught)
        assert isinstance(caught.__cause__, OSError)


def test_a_step_that_a_crash_left_under_another_name_can_be_deleted(renaming: MemoryStorage) -> None:
    commit(renaming, 5)
    renaming.rename_folder("step_5", aside_folder(5, new_attempt(), "old"))
    delete(renaming, 5)
    assert renaming.list() == []


def test_a_step_that_somebody_else_has_deleted_meanwhile_is_deleted(storage: Storage) -> None:
    commit(storage, 5)
    entry = Catalog(storage).entry(5)
    delete(storage, 5)
    delete_step(storage, entry)
    assert [name for name in storage.list() if "5" in name] == []


LEFT_BY = {"a commit": "", "a deletion": "deleted"}
"""In the middle of what a crash came -> how the id begins in the name of the folder that it left."""


@pytest.mark.parametrize("lives", range(12))
@pytest.mark.parametrize("left_by", LEFT_BY)
def test_an_older_version_that_a_crash_left_does_not_come_back(
    renaming: MemoryStorage, lives: int, left_by: str
) -> None:
    commit(renaming, 5)
    renaming.rename_folder("step_5", aside_folder(5, LEFT_BY[left_by] + new_attempt(), "old"))
    commit(renaming, 5)
    newer = Catalog(renaming).record(5)[1].attempt
    entry = Catalog(renaming).entry(5)
    with suppress(Killed):
        delete_step(DyingStorage(renaming, lives), entry)
    assert Catalog(renaming).steps() == [] or Catalog(renaming).record(5)[1].attempt == newer


@pytest.mark.parametrize("left_by", LEFT_BY)
def test_an_older_version_that_somebody_sweeps_meanwhile_keeps_nothing(renaming: MemoryStorage, left_by: str) -> None:
    older = aside_folder(5, LEFT_BY[left_by] + new_attempt(), "old")

    class Swept(StorageWrapper):
        def around(self, operation: Operation, call: Callable[[], T]) -> T:
            if operation.name in ("rename_folder", "delete") and operation.keys[0].startswith(older):
                renaming.delete_tree(older)
            return call()

    commit(renaming, 5)
    renaming.rename_folder("step_5", older)
    commit(renaming, 5)
    delete_step(Swept(renaming), Catalog(renaming).entry(5))
    assert renaming.list() == []


def test_an_attempt_under_way_outlives_the_deletion_of_its_step(storage: Storage) -> None:
    commit(storage, 5)
    start_attempt(storage, 5, "a" * 20)
    started = [key for name in storage.list() for key in walk_files(storage, name[:-1]) if "a" * 20 in key]
    delete(storage, 5)
    assert [key for name in storage.list() for key in walk_files(storage, name[:-1])] == started


def test_what_cannot_be_told_apart_stays(objects: MemoryObjects, caplog: pytest.LogCaptureFixture) -> None:
    commit(objects, 5)
    start_attempt(objects, 5, "a" * 20)
    before = walk_files(objects, "step_5")
    objects.delete([f"step_5/{MANIFEST}"])
    objects.put(f"step_5/{MANIFEST}", [b"damaged"])
    delete_step(objects, Catalog(objects).entry(5))
    assert Catalog(objects).steps() == []
    assert walk_files(objects, "step_5") == [key for key in before if not key.endswith(MANIFEST)]
    assert "is not known" in caplog.text
