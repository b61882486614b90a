from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import CheckpointLoadError, CheckpointSaveError
from shardckpt.format.layout import MANIFEST, new_attempt
from shardckpt.run.catalog import Catalog
from shardckpt.run.scores import Scores, decode_score, encode_score, read_scores, score_key, write_score
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.faults import FailingStorage, RecordingStorage
from tests.run.making import commit, start_attempt


def test_scores_are_read_back_and_steps_without_one_are_fine(storage: Storage) -> None:
    for step in (1, 2, 3):
        commit(storage, step)
    catalog = Catalog(storage)
    write_score(storage, catalog.entry(1), score=-0.25)
    write_score(storage, catalog.entry(3), score=np.array(2))
    assert read_scores(storage, catalog.entries()) == Scores({1: -0.25, 3: 2.0})


def test_a_score_can_be_replaced(storage: Storage) -> None:
    commit(storage, 1)
    entry = Catalog(storage).entry(1)
    for score in (1.0, 1e-300, math.inf):
        write_score(storage, entry, score=score)
        assert read_scores(storage, [entry]).by_step == {1: score}
    assert [name for name in storage.list(entry.attempt_folder) if "score" in name] == ["score.txt"]


def test_nan_is_refused_and_the_old_score_stays(storage: Storage) -> None:
    commit(storage, 1)
    entry = Catalog(storage).entry(1)
    write_score(storage, entry, score=0.5)
    with pytest.raises(ValueError, match="NaN"):
        write_score(storage, entry, score=math.nan)
    assert read_scores(storage, [entry]).by_step == {1: 0.5}


@pytest.mark.parametrize("content", [b"", b"nan\n", b"--0.3\n", b"\xff\xfe", b"0.5 0.6", b"loss"])
def test_a_damaged_score_is_reported_and_not_fatal(
    storage: Storage, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    commit(storage, 1)
    commit(storage, 2)
    catalog = Catalog(storage)
    storage.put(score_key(catalog.entry(1)), [content])
    write_score(storage, catalog.entry(2), score=7)
    with caplog.at_level(logging.WARNING):
        scores = read_scores(storage, catalog.entries())
    assert scores.by_step == {2: 7.0}
    assert list(scores.damaged) == [1]
    assert score_key(catalog.entry(1)) in caplog.text


def test_a_place_that_does_not_answer_is_not_taken_for_a_step_without_a_score(storage: Storage) -> None:
    commit(storage, 1)
    entry = Catalog(storage).entry(1)
    refusing = FailingStorage(storage, times=None)
    with pytest.raises(CheckpointLoadError, match="injected") as load:
        read_scores(refusing, [entry])
    with pytest.raises(CheckpointSaveError, match="injected") as save:
        write_score(refusing, entry, score=1)
    assert load.value.step == save.value.step == 1


def test_a_step_saved_again_begins_without_a_score_on_a_file_system(renaming: MemoryStorage) -> None:
    commit(renaming, 5)
    write_score(renaming, Catalog(renaming).entry(5), score=1)
    commit(renaming, 5, folder="step_5.aaaaaaaaaa.tmp")
    renaming.exchange_folders("step_5", "step_5.aaaaaaaaaa.tmp")
    assert read_scores(renaming, Catalog(renaming).entries()) == Scores()


def test_a_step_saved_again_begins_without_a_score_on_an_object_store(objects: MemoryObjects) -> None:
    commit(objects, 5)
    write_score(objects, Catalog(objects).entry(5), score=1)
    objects.delete([f"step_5/{MANIFEST}"])
    attempt = commit(objects, 5)
    assert read_scores(objects, Catalog(objects).entries()) == Scores()
    write_score(objects, Catalog(objects).entry(5), score=2)
    assert objects.read(f"step_5/{attempt}/score.txt") == b"2.0\n"


def test_the_score_is_that_of_the_attempt_in_force_when_another_is_under_way(objects: MemoryObjects) -> None:
    commit(objects, 5)
    write_score(objects, Catalog(objects).entry(5), score=1)
    start_attempt(objects, 5, new_attempt())
    assert read_scores(objects, Catalog(objects).entries()).by_step == {5: 1.0}


def test_each_score_costs_one_request(storage: Storage) -> None:
    for step in range(5):
        commit(storage, step)
    entries = Catalog(storage).entries()
    recording = RecordingStorage(storage)
    read_scores(recording, entries)
    assert [operation.name for operation in recording.operations] == ["read"] * 5


@given(st.floats(allow_nan=False))
def test_the_text_gives_the_same_number_back(score: float) -> None:
    assert decode_score(encode_score(score)) == score
    assert encode_score(score).decode() == f"{score!r}\n"
