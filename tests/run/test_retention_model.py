"""Keep-last and keep-best as calls, one after the other, against a plain model of what they mean.

The meaning is that of fairseq2: keep-last deletes all but the highest steps, keep-best all but the best scores and the
last step; with `preserve_model` the models of these stay. Beyond that, the newest step that can be resumed from stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.errors import CheckpointDeleteError
from shardckpt.format.layout import MANIFEST
from shardckpt.run.catalog import Catalog
from shardckpt.run.deletion import preserve_model
from shardckpt.run.prune import Deleted, plan_retention, retain
from shardckpt.run.retention import KeepAll, KeepAny, KeepBest, KeepEvery, KeepLast, Policy
from shardckpt.run.scores import write_score
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.faults import FailingStorage
from tests.run.faulty import READING, DyingStorage, Killed
from tests.run.making import CONSOLIDATED, MODELLESS, OWN, SCATTERED, commit, is_whole

SHAPES = {"own": OWN, "scattered": SCATTERED, "consolidated": CONSOLIDATED, "no model": MODELLESS}


@dataclass(frozen=True)
class Step:
    """What the model knows of a step."""

    shape: str
    score: float | None = None
    model_only: bool = False


Run = dict[int, Step]


@dataclass(frozen=True)
class Save:
    step: int
    shape: str
    score: float | None


@dataclass(frozen=True)
class Keep:
    """One call; several policies stand for their union."""

    policies: tuple[Policy, ...]
    preserve_model: bool
    protected: frozenset[int] = frozenset()


def kept_by(policy: Policy, run: Run) -> set[int]:
    if isinstance(policy, KeepLast):
        return {step for step in run if sum(other > step for other in run) < policy.n}
    if isinstance(policy, KeepEvery):
        return {step for step in run if step % policy.steps == 0}
    if isinstance(policy, KeepAll):
        return set(run)
    assert isinstance(policy, KeepBest)
    worth = {
        step: -known.score if policy.lower_better else known.score
        for step, known in run.items()
        if known.score is not None
    }
    return {s for s in worth if sum((worth[o], o) > (worth[s], s) for o in worth) < policy.n}


def after(run: Run, keep: Keep) -> Run:
    """The run after the call."""
    full = [step for step, known in run.items() if not known.model_only]
    stay = {max(run, default=-1), max(full, default=-1)} | keep.protected
    for policy in keep.policies:
        stay |= kept_by(policy, run)
    left = {}
    for step, known in run.items():
        if step in stay:
            left[step] = known
        elif keep.preserve_model:
            left[step] = known if known.shape == "no model" else replace(known, model_only=True)
    return left


def freed(before: Run, left: Run) -> dict[int, tuple[int, bool]]:
    """By step, the bytes that went, and whether the model stayed."""
    found = {}
    for step, known in before.items():
        sizes = {name: len(content) for name, content in SHAPES[known.shape].files.items()}
        model = {name: nbytes for name, nbytes in sizes.items() if name in SHAPES[known.shape].model}
        if step not in left:
            found[step] = (sum((model if known.model_only else sizes).values()), False)
        elif left[step] != known:
            found[step] = (sum(sizes.values()) - sum(model.values()), True)
    return found


def carry_out(storage: Storage, act: Save | Keep) -> list[Deleted]:
    if isinstance(act, Keep):
        policy = act.policies[0] if len(act.policies) == 1 else KeepAny(act.policies)
        protected = dict.fromkeys(act.protected, "protected")
        return retain(Catalog(storage), policy, preserve_model=act.preserve_model, protected=protected)
    commit(storage, act.step, shape=SHAPES[act.shape])
    if act.score is not None:
        write_score(storage, Catalog(storage).entry(act.step), score=act.score)
    return []


def check(storage: Storage, run: Run) -> None:
    """The storage holds this run and nothing else of it."""
    catalog = Catalog(storage)
    assert catalog.steps() == sorted(run)
    assert list(catalog.full_steps()) == sorted((s for s in run if not run[s].model_only), reverse=True)
    for step, known in run.items():
        shape = SHAPES[known.shape]
        manifest = catalog.record(step)[1]
        names = {file.name.removeprefix(f"{manifest.attempt}/") for file in manifest.files}
        assert names == set(shape.model if known.model_only else shape.files)
        assert is_whole(storage, step)


SCORE = st.none() | st.sampled_from([-1.0, 0.0, -0.0, 0.5, math.inf, -math.inf]) | st.floats(allow_nan=False)
SAVE = st.builds(Save, st.integers(0, 30), st.sampled_from(sorted(SHAPES)), SCORE)
SINGLE = st.one_of(
    st.builds(KeepLast, st.integers(1, 4)),
    st.builds(KeepBest, st.integers(1, 4), st.booleans()),
    st.builds(KeepEvery, steps=st.integers(1, 6)),
)
KEEP = st.builds(
    Keep,
    st.lists(SINGLE, min_size=1, max_size=3).map(tuple),
    st.booleans(),
    st.frozensets(st.integers(0, 30), max_size=1),
)
ACTS = st.lists(st.one_of(SAVE, SAVE, SAVE, KEEP), max_size=25)


@settings(max_examples=250, deadline=None)
@given(ACTS, st.sampled_from([MemoryStorage, MemoryObjects]))
def test_sequences_of_saves_and_calls_agree_with_the_model(acts: list[Save | Keep], kind: type[MemoryObjects]) -> None:
    storage, run = kind("run"), Run()
    for act in acts:
        if isinstance(act, Save):
            if act.step not in run:
                carry_out(storage, act)
                run[act.step] = Step(act.shape, act.score)
            continue
        left = after(run, act)
        told = {gone.step: (gone.nbytes, gone.model_kept) for gone in carry_out(storage, act)}
        assert told == freed(run, left)
        assert list(told) == sorted(told), "oldest first"
        run = left
        check(storage, run)
        assert carry_out(storage, act) == [], "the same call again finds nothing to do"
    check(storage, run)


@settings(max_examples=25, deadline=None)
@given(st.lists(SAVE, min_size=1, max_size=6, unique_by=lambda save: save.step), KEEP, st.integers(0, 60))
def test_a_crash_during_a_call_harms_no_step_and_the_next_call_ends_it(
    saves: list[Save], keep: Keep, lives: int
) -> None:
    storage, run = MemoryObjects("run"), Run()
    for save in saves:
        carry_out(storage, save)
        run[save.step] = Step(save.shape, save.score)
    left = after(run, keep)
    try:
        carry_out(DyingStorage(storage, lives), keep)
    except Killed:
        catalog = Catalog(storage)
        steps = {step: catalog.record(step)[1].model_only for step in catalog.steps()}
        assert set(left) <= set(steps) <= set(run)
        for step, model_only in steps.items():
            assert is_whole(storage, step)
            assert model_only == run[step].model_only or model_only == left[step].model_only
    carry_out(storage, keep)
    check(storage, left)


def test_as_the_trainers_of_fairseq2_call_it(storage: Storage) -> None:
    """All models of the last four, and of the last two everything."""
    run = Run()
    for step in range(1, 10):
        carry_out(storage, Save(step, "consolidated", None))
        run[step] = Step("consolidated")
        for act in (Keep((KeepLast(4),), False), Keep((KeepLast(2),), True)):
            carry_out(storage, act)
            run = after(run, act)
    assert {step: known.model_only for step, known in run.items()} == {6: True, 7: True, 8: False, 9: False}
    check(storage, run)


def test_the_last_step_stays_beside_the_best() -> None:
    """Scores 0.3, 0.9, 0.5 and n = 1 leave steps 2 and 3; one without a score among them changes nothing."""
    for scores in ([0.3, 0.9, 0.5], [0.3, 0.9, None], [None, 0.9, -math.inf]):
        storage = MemoryStorage("run")
        for step, score in enumerate(scores, start=1):
            carry_out(storage, Save(step, "own", score))
        retain(Catalog(storage), KeepBest(1))
        assert Catalog(storage).steps() == [2, 3]


def make(storage: Storage, *shapes: str) -> Catalog:
    for step, shape in enumerate(shapes, start=1):
        carry_out(storage, Save(step, shape, None))
    return Catalog(storage)


@pytest.mark.parametrize("keep_models", [False, True])
def test_the_newest_full_step_outlives_newer_ones_of_which_only_the_model_is_left(
    storage: Storage, keep_models: bool
) -> None:
    catalog = make(storage, "own", "own", "own", "own")
    retain(catalog, KeepEvery(steps=2), preserve_model=True, protected={3: "resumed from"})
    retain(catalog, KeepEvery(steps=2), preserve_model=True)  # step 3, too
    assert list(catalog.full_steps()) == [4, 2]
    storage.replace(f"step_4/{MANIFEST}", b"damaged")
    retain(catalog, KeepLast(1), preserve_model=keep_models)
    assert next(step for step in catalog.full_steps() if step != 4) == 2
    assert catalog.steps() == ([1, 2, 3, 4] if keep_models else [2, 4])
    plan = plan_retention(catalog, KeepLast(1))
    assert plan.kept[2] == "the newest whole one with more than its model"


def test_where_only_models_are_left_the_newest_of_them_stays(storage: Storage) -> None:
    catalog = make(storage, "own", "own", "own")
    for step in (1, 2, 3):
        preserve_model(storage, catalog.entry(step))
    storage.replace(f"step_3/{MANIFEST}", b"damaged")
    assert plan_retention(catalog, KeepLast(1)).kept[2] == "the newest whole one"
    assert [gone.step for gone in retain(catalog, KeepLast(1))] == [1]


def test_a_step_without_a_model_is_left_alone_and_logged(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    catalog = make(storage, "no model", "own", "own")
    assert [gone.step for gone in retain(catalog, KeepLast(1), preserve_model=True)] == [2]
    assert list(catalog.full_steps()) == [3, 1]
    assert "step 1 is not deleted" in caplog.text
    assert [gone.step for gone in retain(catalog, KeepLast(1))] == [1, 2]


def test_a_damaged_consolidated_model_is_left_alone_and_logged(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = make(storage, "consolidated", "own")
    storage.delete([f"{catalog.entry(1).attempt_folder}/model.pt"])
    assert retain(catalog, KeepLast(1), preserve_model=True) == []
    assert list(catalog.full_steps()) == [2, 1]
    assert "step 1 is not deleted" in caplog.text


def test_what_goes_wrong_with_one_step_does_not_stop_the_others(storage: Storage) -> None:
    make(storage, "own", "own", "own", "own")
    failing = FailingStorage(storage, lambda do: do.name not in READING and "step_2" in do.key, times=None)
    with pytest.raises(CheckpointDeleteError, match=r"step 2: .*injected"):
        retain(Catalog(failing), KeepLast(1), preserve_model=True)
    assert list(Catalog(storage).full_steps()) == [4, 2]


@pytest.mark.parametrize("n", [0, -1])
def test_to_keep_none_is_refused(n: int) -> None:
    for policy in (KeepLast, KeepBest):
        with pytest.raises(ValueError, match="1 or more"):
            policy(n)
