from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.errors import CheckpointDeleteError, CheckpointLoadError
from shardckpt.format.layout import MANIFEST, step_folder
from shardckpt.run.catalog import Catalog
from shardckpt.run.prune import Deleted, plan_retention, retain
from shardckpt.run.retention import Fact, KeepAll, KeepAny, KeepBest, KeepEvery, KeepLast, Policy, StepFacts, decide
from shardckpt.run.scores import score_key, write_score
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.faults import FailingStorage, RecordingStorage, on
from tests.run.faulty import READING, DyingStorage, Killed
from tests.run.making import FILES, commit, fill, is_whole, record_of


def make_run(storage: Storage, scores: Sequence[float | None]) -> Catalog:
    """Steps 10, 20, ... with these scores."""
    for number, score in enumerate(scores, start=1):
        commit(storage, 10 * number)
        if score is not None:
            write_score(storage, Catalog(storage).entry(10 * number), score=score)
    return Catalog(storage)


def damage(storage: Storage, key: str) -> None:
    storage.delete([key])
    storage.put(key, [b"damaged"])


def test_last_and_best_stay_and_the_rest_goes_with_its_size_and_reason(storage: Storage) -> None:
    catalog = make_run(storage, [0.9, 0.1, None, -2.0, 0.5, None])
    policy = KeepLast(2) | KeepBest(1) | KeepEvery(steps=30)
    plan = plan_retention(catalog, policy, protected={20: "resumed from"})
    assert plan.doomed == (40,)
    assert catalog.steps() == [10, 20, 30, 40, 50, 60], "a plan only looks"
    nbytes = sum(map(len, FILES.values()))
    assert retain(catalog, policy, protected={20: "resumed from"}) == [Deleted(40, f"not kept by {policy}", nbytes)]
    assert catalog.steps() == [10, 20, 30, 50, 60] == sorted(plan.kept)
    assert all(is_whole(storage, step) for step in catalog.steps())
    assert [deleted.step for deleted in retain(catalog, policy)] == [20]
    assert retain(catalog, policy) == []


def test_an_empty_run_is_pruned_to_an_empty_run(storage: Storage) -> None:
    assert retain(Catalog(storage), KeepLast(1)) == []


def test_errors_of_one_deletion_do_not_stop_the_others(storage: Storage) -> None:
    catalog = make_run(storage, [None] * 6)
    changing = FailingStorage(
        storage, lambda do: do.name not in READING and any(f"step_{n}" in do.key for n in (20, 40)), times=None
    )
    with pytest.raises(CheckpointDeleteError) as raised:
        retain(Catalog(changing), KeepLast(1))
    assert raised.value.step == 20
    assert isinstance(raised.value.__cause__, CheckpointDeleteError)
    for part in ("step 20: ", "step 40: ", "injected", storage.url):
        assert part in str(raised.value)
    assert catalog.steps() == [20, 40, 60]
    assert all(is_whole(storage, step) for step in catalog.steps())
    assert [deleted.step for deleted in retain(catalog, KeepLast(1))] == [20, 40]


def test_a_record_that_cannot_be_read_now_is_an_error_and_not_a_deletion(storage: Storage) -> None:
    catalog = make_run(storage, [None] * 3)
    unreadable = FailingStorage(storage, on("read", key=f"step_10/{MANIFEST}"), times=None)
    with pytest.raises(CheckpointDeleteError, match="step 10: "):
        retain(Catalog(unreadable), KeepLast(1))
    assert catalog.steps() == [10, 30]


def test_a_doomed_step_with_a_damaged_record_is_left_for_a_person(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = make_run(storage, [None] * 4)
    damage(storage, f"step_10/{MANIFEST}")
    with caplog.at_level(logging.WARNING):
        assert [deleted.step for deleted in retain(catalog, KeepLast(1))] == [20, 30]
    assert catalog.steps() == [10, 40]
    assert "step 10 is not deleted" in caplog.text


def test_a_folder_that_a_person_copied_is_not_deleted(renaming: MemoryStorage) -> None:
    catalog = make_run(renaming, [None] * 3)
    attempt = record_of(30, "a" * 20)
    commit(renaming, attempt.step, attempt=attempt.attempt, folder="step_15")
    assert [deleted.step for deleted in retain(catalog, KeepLast(1))] == [10, 20]
    assert catalog.steps() == [15, 30]


def test_the_newest_step_with_a_sound_record_stays(storage: Storage) -> None:
    catalog = make_run(storage, [None] * 5)
    for step in (40, 50):
        damage(storage, f"step_{step}/{MANIFEST}")
    assert plan_retention(catalog, KeepLast(2)).kept[30] == "the newest whole one with more than its model"
    assert [deleted.step for deleted in retain(catalog, KeepLast(2))] == [10, 20]


def test_a_step_that_lacks_a_file_is_not_the_one_to_go_on_from(storage: Storage) -> None:
    catalog = make_run(storage, [None] * 4)
    for step, harm in ((30, lambda key: damage(storage, key)), (40, lambda key: storage.delete([key]))):
        folder, record = catalog.record(step)
        harm(record.files[-1].key_in(folder))
    assert plan_retention(catalog, KeepLast(1)).kept[20] == "the newest whole one with more than its model"
    saved = plan_retention(catalog, KeepLast(1), protected={40: "the step that was just saved"})
    assert 20 in saved.doomed, "nobody looks at files that were written a moment ago"
    assert [deleted.step for deleted in retain(catalog, KeepLast(1))] == [10, 30]
    assert catalog.steps() == [20, 40]


def test_where_no_step_is_whole_the_newest_with_a_sound_record_stays(storage: Storage) -> None:
    catalog = make_run(storage, [None] * 3)
    for step in (10, 20):
        folder, record = catalog.record(step)
        storage.delete([record.files[-1].key_in(folder)])
    damage(storage, f"step_30/{MANIFEST}")
    assert plan_retention(catalog, KeepLast(1)).kept[20] == "the newest one with a sound record"
    assert 20 in plan_retention(catalog, KeepLast(1), protected={10: "resumed from"}).doomed


def test_the_best_step_stays_whatever_a_policy_says(storage: Storage) -> None:
    catalog = make_run(storage, [0.9, 0.5, 0.1, None])
    plan = plan_retention(catalog, KeepLast(1), best_by=KeepBest(1))
    assert (list(plan.kept), plan.kept[10], plan.doomed) == ([10, 40], "the best by score: 0.9", (20, 30))
    lower = KeepBest(1, lower_better=True)
    assert plan_retention(catalog, KeepLast(1), best_by=lower).doomed == (10, 20)
    assert [deleted.step for deleted in retain(catalog, KeepLast(1), best_by=lower)] == [10, 20]
    damage(storage, f"{catalog.entry(30).attempt_folder}/score.txt")
    kept = plan_retention(catalog, KeepLast(1), best_by=lower).kept
    assert kept[30] == "its score cannot be read"  # so it may be the best


def test_scores_are_not_looked_at_while_nothing_that_would_go_has_one(storage: Storage) -> None:
    recording = RecordingStorage(make_run(storage, [None] * 4).storage)
    assert plan_retention(Catalog(recording), KeepLast(2), best_by=KeepBest(1)).doomed == (10, 20)
    asked = [operation.key for operation in recording.operations if operation.key.endswith("score.txt")]
    assert len(asked) == 2


def test_a_step_whose_score_is_damaged_may_be_the_best_and_stays(storage: Storage) -> None:
    catalog = make_run(storage, [0.9, 0.5, 0.1, None])
    damage(storage, score_key(catalog.entry(10)))
    assert plan_retention(catalog, KeepBest(1)).kept[10] == "its score cannot be read"
    assert [deleted.step for deleted in retain(catalog, KeepBest(1))] == [30]


def test_scores_that_cannot_be_read_now_stop_the_pruning(storage: Storage) -> None:
    catalog = make_run(storage, [0.9, 0.5, None])
    unreadable = FailingStorage(storage, on("read", key="score.txt"), times=None)
    with pytest.raises(CheckpointLoadError):
        retain(Catalog(unreadable), KeepBest(1))
    assert catalog.steps() == [10, 20, 30]


def test_a_policy_of_ones_own_may_look_at_times(storage: Storage) -> None:
    class KeepJanuary(Policy):
        @property
        def uses(self) -> frozenset[Fact]:
            return frozenset({"created"})

        def keep(self, history: Sequence[StepFacts]) -> dict[int, str]:
            return {f.step: "of January" for f in history if f.created and f.created.startswith("2026-01")}

    for step, month in enumerate(("01", "02", "03", "01", "04"), start=1):
        commit(storage, step, created=f"2026-{month}-01T00:00:00Z")
    damage(storage, f"step_3/{MANIFEST}")
    assert [deleted.step for deleted in retain(Catalog(storage), KeepJanuary())] == [2]
    assert Catalog(storage).steps() == [1, 3, 4, 5]


def test_a_step_that_another_process_has_deleted_meanwhile_is_no_error(objects: MemoryObjects) -> None:
    make_run(objects, [None] * 3)

    class Beside(StorageWrapper):
        def read(self, key: str) -> bytes:
            objects.delete([f"step_10/{MANIFEST}"])
            return super().read(key)

    assert [deleted.step for deleted in retain(Catalog(Beside(objects)), KeepLast(1))] == [20]
    assert Catalog(objects).steps() == [30]


def test_only_what_the_policy_looks_at_is_read(storage: Storage) -> None:
    make_run(storage, [0.5] * 6)
    for policy, reads in ((KeepAll(), 0), (KeepLast(9), 0), (KeepBest(9), 6)):
        recording = RecordingStorage(storage)
        retain(Catalog(recording), policy)
        names = [operation.name for operation in recording.operations]
        assert names.count("read") == reads
        assert set(names) <= READING


@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
def test_a_crash_at_any_point_of_a_pruning_harms_no_step(kind: type[MemoryObjects]) -> None:
    for lives in range(1000):
        storage = kind("run")
        catalog = make_run(storage, [0.1, 0.9, 0.3, None])
        try:
            retain(Catalog(DyingStorage(storage, lives)), KeepLast(1) | KeepBest(1))
        except Killed:
            steps = catalog.steps()
            assert {20, 40} <= set(steps)
            assert all(is_whole(storage, step) for step in steps)
            retain(catalog, KeepLast(1) | KeepBest(1))
            assert catalog.steps() == [20, 40]
        else:
            break
    assert lives > 25


# Against the decision, which has a model of its own (test_retention.py)

SINGLE = st.one_of(
    st.builds(KeepLast, st.integers(1, 3)),
    st.builds(KeepBest, st.integers(1, 3), st.booleans()),
    st.builds(KeepEvery, steps=st.integers(2, 5)),
)
RUN = st.dictionaries(st.integers(0, 20), st.none() | st.floats(allow_nan=False), max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    RUN,
    st.lists(SINGLE, min_size=1, max_size=3),
    st.sets(st.integers(0, 20), max_size=2),
    st.sets(st.integers(0, 20), max_size=2),
    st.sampled_from(["file system", "object store", "disk"]),
)
def test_a_run_is_pruned_to_exactly_what_is_to_be_kept(
    run: dict[int, float | None], policies: list[Policy], protected: set[int], foreign: set[int], kind: str
) -> None:
    with tempfile.TemporaryDirectory() as root:
        storage: Storage = LocalStorage(root)
        if kind != "disk":
            storage = MemoryObjects("run") if kind == "object store" else MemoryStorage("run")
        for step, score in run.items():
            commit(storage, step)
            if score is not None:
                write_score(storage, Catalog(storage).entry(step), score=score)
        for step in foreign - set(run):
            fill(storage, step_folder(step))
        policy = KeepAny(tuple(policies))
        stay = dict.fromkeys(protected, "protected")
        expected = decide(policy, [StepFacts(step, score=score) for step, score in run.items()], protected=stay)
        deleted = retain(Catalog(storage), policy, protected=stay)
        assert tuple(one.step for one in deleted) == expected.doomed
        assert Catalog(storage).steps() == list(expected.kept)
        assert all(is_whole(storage, step) for step in expected.kept)
        left = {*expected.kept, *(foreign - set(run))}
        assert storage.list() == sorted(f"{step_folder(step)}/" for step in left)
