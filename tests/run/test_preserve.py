"""Deletion of all but the model: whole or model-only at every point, by every reader, and ended by a second try."""

from __future__ import annotations

import logging
from contextlib import suppress

import pytest

from shardckpt.errors import (
    CheckpointDamagedError,
    CheckpointDeleteError,
    CheckpointError,
    CheckpointLoadError,
    CheckpointNotFoundError,
)
from shardckpt.format.layout import MANIFEST, aside_folder, new_attempt
from shardckpt.format.reduced import NoModelError
from shardckpt.run.catalog import Catalog
from shardckpt.run.deletion import delete_step, preserve_model
from shardckpt.run.leftovers import sweep
from shardckpt.run.scores import read_scores, write_score
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import Operation
from shardckpt.testing.faults import FailingStorage, RecordingStorage, TornStorage, on
from tests.run.faulty import READING, DyingStorage, Killed, WatchedStorage, walk_files
from tests.run.making import CONSOLIDATED, MODELLESS, OWN, SCATTERED, Shape, commit, fill, is_whole, start_attempt

SHAPES = pytest.mark.parametrize(
    "shape",
    [
        pytest.param(OWN, id="a file of its own"),
        pytest.param(SCATTERED, id="in the files of the ranks"),
        pytest.param(CONSOLIDATED, id="consolidated"),
    ],
)


def make_run(storage: Storage, shape: Shape) -> str:
    """Steps 4 and 5, both scored; gives the attempt of step 5."""
    commit(storage, 4, shape=shape)
    attempt = commit(storage, 5, shape=shape)
    for step in (4, 5):
        write_score(storage, Catalog(storage).entry(step), score=step / 10)
    return attempt


def preserve(storage: Storage, step: int = 5) -> None:
    preserve_model(storage, Catalog(storage).entry(step))


def names(storage: Storage, step: int = 5) -> set[str]:
    """The files of a step, without the folder of its attempt, and without record and score."""
    folder = Catalog(storage).entry(step).attempt_folder
    found = {key.removeprefix(f"{folder}/") for key in walk_files(storage, folder)}
    return found - {MANIFEST, "score.txt"}


def state_of(storage: Storage, attempt: str, shape: Shape) -> str:
    """Whether step 5 is all there or its model is; nothing else may be."""
    assert Catalog(storage).steps() == [4, 5]
    assert is_whole(storage, 4)
    assert is_whole(storage, 5), "what the record names is there"
    entry = Catalog(storage).entry(5)
    manifest = Catalog(storage).record(5)[1]
    assert manifest.attempt == attempt
    assert read_scores(storage, [entry]).by_step == {5: 0.5}
    prefix = "" if isinstance(storage, RenamingStorage) else f"{attempt}/"
    named = {file.name.removeprefix(prefix) for file in manifest.files}
    assert named == set(shape.model if manifest.model_only else shape.files)
    return "model" if manifest.model_only else "whole"


@SHAPES
def test_the_model_the_score_and_the_files_of_others_stay(storage: Storage, shape: Shape) -> None:
    attempt = make_run(storage, shape)
    folder = Catalog(storage).entry(5).attempt_folder
    fill(storage, folder, {"samples/rank_0.pt": b"somebody's", "notes.txt": b"too"})
    others = walk_files(storage, "step_4")
    reduced = preserve_model(storage, Catalog(storage).entry(5))
    assert reduced is not None
    assert state_of(storage, attempt, shape) == "model"
    assert names(storage) == shape.model | {"samples/rank_0.pt", "notes.txt"}
    assert reduced.manifest == Catalog(storage).record(5)[1]
    assert walk_files(storage, "step_4") == others
    assert list(Catalog(storage).full_steps()) == [4]
    preserve(storage, 4)
    assert list(Catalog(storage).full_steps()) == []


@SHAPES
def test_a_second_time_changes_nothing(storage: Storage, shape: Shape) -> None:
    attempt = make_run(storage, shape)
    preserve(storage)
    record, files = Catalog(storage).record(5), walk_files(storage, "step_5")
    recording = RecordingStorage(storage)
    assert preserve_model(recording, Catalog(storage).entry(5)) is None
    assert {done.name for done in recording.operations} <= READING
    assert state_of(storage, attempt, shape) == "model"
    assert (Catalog(storage).record(5), walk_files(storage, "step_5")) == (record, files)


@SHAPES
def test_a_step_of_which_only_the_model_is_left_can_be_deleted(storage: Storage, shape: Shape) -> None:
    make_run(storage, shape)
    preserve(storage)
    delete_step(storage, Catalog(storage).entry(5), manifest=Catalog(storage).record(5)[1])
    assert Catalog(storage).steps() == [4]
    assert storage.list() == ["step_4/"]


@SHAPES
def test_the_new_record_is_in_force_before_any_file_goes(storage: Storage, shape: Shape) -> None:
    make_run(storage, shape)
    entry = Catalog(storage).entry(5)
    recording = RecordingStorage(storage)
    preserve_model(recording, entry)
    changes = [done for done in recording.operations if done.name not in READING]
    exchanged = "replace" if isinstance(storage, RenamingStorage) else "swap"
    assert [done.name for done in changes] == [exchanged, "delete"]
    assert changes[0].keys == (entry.record_key,)
    doomed = {f"{entry.attempt_folder}/{name}" for name in shape.files.keys() - shape.model}
    assert set(changes[1].keys) == doomed


@SHAPES
def test_a_crash_at_any_point_leaves_the_step_or_its_model_and_a_second_try_ends_it(
    storage: Storage, shape: Shape
) -> None:
    seen = set()
    for lives in range(1000):
        for step in (4, 5):
            storage.delete_tree(f"step_{step}")
        attempt = make_run(storage, shape)
        entry = Catalog(storage).entry(5)
        try:
            preserve_model(DyingStorage(storage, lives), entry)
        except Killed:
            seen.add(state_of(storage, attempt, shape))
        else:
            break
        with suppress(Killed):  # and once more, also in the middle of cleaning up
            preserve_model(DyingStorage(storage, 4), entry)
        state_of(storage, attempt, shape)
        preserve(storage)
        assert state_of(storage, attempt, shape) == "model"
        assert names(storage) == shape.model
    else:
        pytest.fail("it never ended")
    assert lives > 3, "there were that many points to die at"
    assert seen == {"whole", "model"}


@SHAPES
def test_after_a_crash_at_any_point_the_step_can_be_deleted(storage: Storage, shape: Shape) -> None:
    for lives in range(1000):
        make_run(storage, shape)
        ended = False
        with suppress(Killed):
            preserve_model(DyingStorage(storage, lives), Catalog(storage).entry(5))
            ended = True
        for step in (4, 5):
            entry = Catalog(storage).entry(step)
            delete_step(storage, entry, manifest=Catalog(storage).record(step)[1])
        assert storage.list() == []
        if ended:
            break


@SHAPES
@pytest.mark.parametrize("lost", [False, True], ids=["refused", "answer lost"])
def test_an_error_at_any_point_is_told_and_a_second_try_ends_it(storage: Storage, shape: Shape, lost: bool) -> None:
    for nth in range(1, 100):
        for step in (4, 5):
            storage.delete_tree(f"step_{step}")
        attempt = make_run(storage, shape)
        failing = FailingStorage(storage, nth=nth, after=lost)
        caught: CheckpointError | None = None
        try:
            preserve_model(failing, Catalog(storage).entry(5))
        except (CheckpointDeleteError, CheckpointLoadError) as error:
            caught = error
        assert failing.failed == (caught is not None), "every error is told"
        state_of(storage, attempt, shape)
        if caught is None:
            break
        assert caught.step == 5
        assert "injected" in str(caught)
        assert not isinstance(caught, CheckpointDamagedError)
        preserve(storage)
        assert state_of(storage, attempt, shape) == "model"
        assert names(storage) == shape.model
    assert 3 < nth < 99


@SHAPES
def test_readers_beside_it_find_the_step_or_its_model_at_every_moment(storage: Storage, shape: Shape) -> None:
    attempt = make_run(storage, shape)
    entry = Catalog(storage).entry(5)
    seen = []
    preserve_model(WatchedStorage(storage, lambda _: seen.append(state_of(storage, attempt, shape))), entry)
    seen.append(state_of(storage, attempt, shape))
    assert seen == sorted(seen, reverse=True), "first whole, and from some moment on the model"
    assert set(seen) == {"whole", "model"}


def test_leftovers_are_told_by_their_names_and_files_of_others_stay(storage: Storage) -> None:
    attempt = make_run(storage, SCATTERED)
    preserve(storage)
    folder = Catalog(storage).entry(5).attempt_folder
    left = {"rank_7.pt", "replicated.1.pt", "metadata.pt", "model.0.pt"}
    others = {"rank_7.txt", "model.pt.bak", "notes/rank_9.pt", "my_model.pt"}
    fill(storage, folder, dict.fromkeys(left | others, b""))
    preserve(storage)
    assert state_of(storage, attempt, SCATTERED) == "model"
    assert names(storage) == SCATTERED.model | others


def test_what_others_have_under_way_stays(storage: Storage) -> None:
    make_run(storage, OWN)
    folder = start_attempt(storage, 5, "a" * 20)
    started = walk_files(storage, folder)
    preserve(storage)
    preserve(storage)
    assert walk_files(storage, folder) == started


def test_a_step_without_a_model_is_left_as_it_is(storage: Storage) -> None:
    commit(storage, 5, shape=MODELLESS)
    before = Catalog(storage).record(5)
    with pytest.raises(CheckpointDeleteError, match=r"left as it is.*delete the step, or keep it") as caught:
        preserve(storage)
    assert isinstance(caught.value.__cause__, NoModelError)
    assert caught.value.step == 5
    assert Catalog(storage).record(5) == before
    assert is_whole(storage, 5)


def test_another_model_key_may_be_given(storage: Storage) -> None:
    commit(storage, 5)
    reduced = preserve_model(storage, Catalog(storage).entry(5), model_key="optimizer")
    assert reduced is not None
    assert [file.name.rpartition("/")[2] for file in reduced.manifest.files] == ["rank_0.pt", "rank_1.pt", "vocab.json"]


@pytest.mark.parametrize("damage", ["missing", "cut off", "flipped"])
def test_a_damaged_consolidated_model_stands_for_nothing(storage: Storage, damage: str) -> None:
    attempt = make_run(storage, CONSOLIDATED)
    key, torn = f"{Catalog(storage).entry(5).attempt_folder}/model.pt", TornStorage(storage)
    if damage == "missing":
        storage.delete([key])
    else:
        torn.tear(key, **({"keep": 9} if damage == "cut off" else {"flip": 9}))
    with pytest.raises(CheckpointDamagedError, match="left as it is") as caught:
        preserve(torn)
    assert caught.value.step == 5
    assert names(storage) >= SCATTERED.files.keys()
    if damage != "missing":
        assert state_of(storage, attempt, CONSOLIDATED) == "whole"


def test_a_damaged_record_is_told(storage: Storage) -> None:
    commit(storage, 5)
    entry = Catalog(storage).entry(5)
    storage.replace(f"step_5/{MANIFEST}", b"damaged")
    with pytest.raises(CheckpointDamagedError):
        preserve_model(storage, entry)
    storage.delete([f"step_5/{MANIFEST}"])
    with pytest.raises(CheckpointNotFoundError):
        preserve_model(storage, entry)


def test_what_was_freed_is_logged_and_why_not_more(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    for step, shape in enumerate((OWN, CONSOLIDATED, SCATTERED)):
        commit(storage, step, shape=shape)
    with caplog.at_level(logging.WARNING):
        preserve(storage, 0)
        preserve(storage, 1)
        assert caplog.records == []
        preserve(storage, 2)
    (record,) = caplog.records
    freed = len(SCATTERED.files["replicated.pt"]) + len(SCATTERED.files["metadata.pt"])
    total = sum(map(len, SCATTERED.files.values()))
    assert f"only {freed} of {total} bytes" in record.getMessage()
    assert "save_consolidated_fsdp_model" in record.getMessage()


def test_a_step_that_a_crash_left_under_another_name_is_reduced_there(renaming: MemoryStorage) -> None:
    commit(renaming, 5)
    old = aside_folder(5, new_attempt(), "old")
    renaming.rename_folder("step_5", old)
    preserve(renaming)
    assert Catalog(renaming).record(5)[0] == old
    assert Catalog(renaming).record(5)[1].model_only
    assert is_whole(renaming, 5)
    commit(renaming, 5)
    assert sweep(Catalog(renaming), own_attempts={}) == [old]


@pytest.mark.parametrize("shape", [OWN, CONSOLIDATED])
def test_a_step_that_is_saved_again_after_its_record_was_replaced_is_not_touched(shape: Shape) -> None:
    """Nobody should; but a save that was taken for dead may wake up, and its files have the same names."""
    storage = MemoryStorage("run")
    make_run(storage, shape)
    attempt = new_attempt()
    tmp = aside_folder(5, attempt, "tmp")
    commit(storage, 5, attempt=attempt, folder=tmp, shape=shape)
    replaced: list[Operation] = []

    def wake(operation: Operation) -> None:
        if replaced and operation.name == "read" and f"{tmp}/" in storage.list():
            storage.exchange_folders("step_5", tmp)
            storage.delete_tree(tmp)
        replaced.extend([operation] if operation.name == "replace" else [])

    with pytest.raises(CheckpointDeleteError, match="saved again"):
        preserve_model(WatchedStorage(storage, wake), Catalog(storage).entry(5))
    assert Catalog(storage).record(5)[1].attempt == attempt
    assert is_whole(storage, 5)
    assert names(storage) == shape.files.keys()


def test_full_steps_are_searched_from_the_newest_and_no_further_than_needed(storage: Storage) -> None:
    for step in range(6):
        commit(storage, step)
    for step in (1, 4, 5):
        preserve(storage, step)
    storage.replace(f"step_2/{MANIFEST}", b"damaged")
    assert list(Catalog(storage).full_steps()) == [3, 2, 0], "a damaged one is for the loader to judge"
    recording = RecordingStorage(storage)
    assert next(Catalog(recording).full_steps()) == 3
    assert [done.name for done in recording.operations].count("read") == 3


def test_full_steps_pass_over_what_is_deleted_meanwhile_and_tell_what_cannot_be_read(objects: MemoryObjects) -> None:
    for step in (1, 2):
        commit(objects, step)

    def delete(operation: Operation) -> None:
        if operation.name == "read":
            objects.delete([f"step_2/{MANIFEST}"])

    assert list(Catalog(WatchedStorage(objects, delete)).full_steps()) == [1]
    with pytest.raises(CheckpointLoadError, match="injected"):
        list(Catalog(FailingStorage(objects, on("read"))).full_steps())
