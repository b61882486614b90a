from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.run.retention import (
    Decision,
    KeepAll,
    KeepAny,
    KeepBest,
    KeepEvery,
    KeepLast,
    Policy,
    PreserveModel,
    StepFacts,
    decide,
)


def history(*scores: float | None) -> list[StepFacts]:
    """Steps 10, 20, ... with these scores."""
    return [StepFacts(10 * number, score=score) for number, score in enumerate(scores, start=1)]


def kept(policy: Policy, facts: Sequence[StepFacts]) -> list[int]:
    return sorted(policy.keep(facts))


def test_keep_last() -> None:
    assert kept(KeepLast(2), history(None, None, None)) == [20, 30]
    assert kept(KeepLast(5), history(None, None)) == [10, 20]
    assert kept(KeepLast(1), []) == []


def test_keep_best_takes_the_direction_that_the_user_says_and_negative_scores() -> None:
    facts = history(-0.3, 0.9, None, -1.5, 0.5)
    assert kept(KeepBest(2), facts) == [20, 50]
    assert kept(KeepBest(2, lower_better=True), facts) == [10, 40]
    assert kept(KeepBest(9), facts) == [10, 20, 40, 50]


@pytest.mark.parametrize("lower_better", [False, True])
def test_of_equal_scores_the_later_step_is_better(lower_better: bool) -> None:
    assert kept(KeepBest(2, lower_better=lower_better), history(1.0, 1.0, 1.0)) == [20, 30]


def test_infinite_scores_are_the_best_or_the_worst() -> None:
    facts = history(float("inf"), 1.0, float("-inf"))
    assert kept(KeepBest(1), facts) == [10]
    assert kept(KeepBest(1, lower_better=True), facts) == [30]


def test_keep_every() -> None:
    facts = [StepFacts(step) for step in (0, 250, 500, 999, 1000)]
    assert kept(KeepEvery(steps=500), facts) == [0, 500, 1000]


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepLast(0),
        lambda: KeepLast(-1),
        lambda: KeepBest(0),
        lambda: KeepEvery(steps=0),
        lambda: KeepAny(()),
    ],
)
def test_a_policy_that_would_keep_nothing_is_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"1 or more|keep nothing"):
        make()  # type: ignore[operator]


def test_policies_are_joined_flat_and_say_what_they_look_at() -> None:
    joined = KeepLast(1) | (KeepBest(1, lower_better=True) | KeepEvery(steps=20))
    assert joined == KeepAny((KeepLast(1), KeepBest(1, lower_better=True), KeepEvery(steps=20)))
    assert str(joined) == "KeepLast(n=1) | KeepBest(n=1, lower_better=True, metric='score') | KeepEvery(steps=20)"
    assert joined.uses == {"score"}
    assert (KeepLast(1) | KeepAll()).uses == set()
    with pytest.raises(TypeError):
        KeepLast(1) | 3  # type: ignore[operator]


def test_a_decision_gives_all_reasons() -> None:
    policy = KeepLast(2) | KeepBest(1)
    facts = [*history(0.5, 0.9, 0.1, None, 0.2), StepFacts(5, pinned=True)]
    decision = decide(policy, facts, protected={30: "resumed from", 99: "not there"})
    assert decision == Decision(
        {
            5: "pinned",
            20: "number 1 of the best: 0.9",
            30: "resumed from",
            40: "one of the last 2",
            50: "the last committed step; one of the last 2",
        },
        doomed=(10,),
    )
    assert list(decision.kept) == sorted(decision.kept)


def test_a_policy_of_ones_own_cannot_overrule_the_last_step() -> None:
    class KeepNothing(Policy):
        def keep(self, history: Sequence[StepFacts]) -> dict[int, str]:
            assert [facts.step for facts in history] == [10, 20]
            return {77: "a step that is not there"}

    assert decide(KeepNothing(), history(1.0, 2.0)[::-1]) == Decision({20: "the last committed step"}, (10,))
    assert decide(KeepNothing() | KeepAll(), history(1.0, 2.0)).doomed == ()


def test_models_stay_where_the_whole_step_does_not() -> None:
    policy = KeepLast(1) | PreserveModel(KeepEvery(steps=20) | KeepBest(1))
    assert policy.uses == {"score"}
    assert str(policy) == f"KeepLast(n=1) | PreserveModel(KeepEvery(steps=20) | {KeepBest(1)})"
    facts = [*history(0.5, 0.9, 0.1, None, 0.2, 0.3), StepFacts(5, pinned=True)]
    assert decide(policy, facts) == Decision(
        {5: "pinned", 60: "the last committed step; one of the last 1"},
        doomed=(10, 30, 50),
        reduced={20: "a multiple of 20; number 1 of the best: 0.9", 40: "a multiple of 20"},
    )
    assert decide(policy | KeepAll(), facts).reduced == {}
    assert decide(PreserveModel(PreserveModel(KeepLast(2))), facts[:3]).reduced == {20: "one of the last 2"}


def test_a_history_has_each_step_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        decide(KeepAll(), [StepFacts(1), StepFacts(1)])


# Against a naive model: a step is doomed unless one of these sentences holds for it.

SCORE = st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.5, float("inf")]), st.floats(allow_nan=False))
FACTS = st.builds(StepFacts, st.integers(0, 40), score=SCORE, pinned=st.booleans())
HISTORY = st.lists(FACTS, unique_by=lambda facts: facts.step, max_size=12)
SINGLE = st.one_of(
    st.builds(KeepLast, st.integers(1, 5)),
    st.builds(KeepBest, st.integers(1, 5), st.booleans()),
    st.builds(KeepEvery, steps=st.integers(1, 10)),
    st.just(KeepAll()),
)


def model_keeps(policy: Policy, facts: StepFacts, history: Sequence[StepFacts]) -> bool:
    if isinstance(policy, KeepLast):
        return sum(other.step > facts.step for other in history) < policy.n
    if isinstance(policy, KeepBest):
        return facts.score is not None and sum(beats(other, facts, policy) for other in history) < policy.n
    if isinstance(policy, KeepEvery):
        return facts.step % policy.steps == 0
    return True


def beats(one: StepFacts, other: StepFacts, policy: KeepBest) -> bool:
    if one.score is None or other.score is None:
        return False
    if one.score == other.score:
        return one.step > other.step
    return (one.score < other.score) == policy.lower_better


@settings(max_examples=200, deadline=None)
@given(
    HISTORY,
    st.lists(SINGLE, min_size=1, max_size=3),
    st.lists(SINGLE, max_size=2),
    st.sets(st.integers(0, 40), max_size=3),
)
def test_decisions_agree_with_the_model(
    facts: list[StepFacts], policies: list[Policy], of_models: list[Policy], protected: set[int]
) -> None:
    policy = policies[0]
    for other in [*policies[1:], *map(PreserveModel, of_models)]:
        policy = policy | other
    stays = {
        one.step
        for one in facts
        if one.pinned
        or one.step in protected
        or one.step == max(other.step for other in facts)
        or any(model_keeps(each, one, facts) for each in policies)
    }
    decision = decide(policy, facts, protected=dict.fromkeys(protected, "protected"))
    assert set(decision.kept) == stays
    models = {one.step for one in facts if any(model_keeps(each, one, facts) for each in of_models)} - stays
    assert set(decision.reduced) == models
    assert decision.doomed == tuple(sorted({one.step for one in facts} - stays - models))
    assert all(decision.kept.values())
