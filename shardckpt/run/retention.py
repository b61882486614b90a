"""Retention: which steps to keep, and why. Pure functions over facts; nothing here touches a storage.

A policy is asked on rank 0 after each commit. Policies are joined by `|`: a step stays if any of them keeps it, and
its model stays if any keeps that (`PreserveModel`). `decide` adds what no policy may overrule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Literal

SCORE = "score"
"""What the score is called among the metrics of a step."""

Fact = Literal["score", "metrics", "created"]
"""Facts that cost a request per step, so they are gathered only for policies that name them."""

NOTHING: Mapping[int, str] = MappingProxyType({})
_NO_METRICS: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What is known of a committed step."""

    step: int
    created: str | None = None
    """UTC, ISO 8601, from its record; None if no policy asked for it or the record cannot be read."""
    score: float | None = None
    """None if no policy asked for it or the step has none."""
    pinned: bool = False
    metrics: Mapping[str, float] = field(default_factory=lambda: _NO_METRICS)
    """By name; empty if no policy asked for them."""

    def value(self, metric: str) -> float | None:
        """The score, or a metric; None if the step has none."""
        return self.score if metric == SCORE else self.metrics.get(metric)


class Policy(ABC):
    """Says which steps to keep. A policy of your own needs `keep`, and `uses` if it looks at more than step numbers."""

    @abstractmethod
    def keep(self, history: Sequence[StepFacts]) -> dict[int, str]:
        """The steps to keep and the reason for each, for people. `history` ascends by step. Pure: no I/O, no clock."""

    def keep_model(self, history: Sequence[StepFacts]) -> dict[int, str]:
        """The same for steps of which the model is to stay, if they are not kept as they are."""
        return {}

    @property
    def uses(self) -> frozenset[Fact]:
        return frozenset()

    @property
    def keeps_all(self) -> bool:
        """Whether it keeps every step, whatever there is: then nobody need look."""
        return False

    def __or__(self, other: Policy) -> KeepAny:
        if not isinstance(other, Policy):
            return NotImplemented
        return KeepAny((*_members(self), *_members(other)))


@dataclass(frozen=True)
class KeepAll(Policy):
    """Nothing is ever deleted."""

    @property
    def keeps_all(self) -> bool:
        return True

    def keep(self, history: Sequence[StepFacts]) -> dict[int, str]:
        return {facts.step: "all are kept" for facts in history}


@dataclass(frozen=True)
class KeepLast(Policy):
    """The `n` steps with the highest numbers."""

    n: int

    def __post_init__(self) -> None:
        _at_least_one("KeepLast", self.n)

    def keep(self, history: Sequence[StepFacts]) -> dict[int, str]:
        steps = sorted(facts.step for facts in history)
        return dict.fromkeys(steps[-self.n :], f"one of the last {self.n}")


@dataclass(frozen=True)
class KeepBest(Policy):
    """The `n` steps with the best scores, or with the best values of a metric that `save_metrics` stored; of equal ones
    the later. Steps that have none are not among them."""

    n: int
    lower_better: bool = False
    metric: str = SCORE

    def __post_init__(self) -> None:
        _at_least_one("KeepBest", self.n)

    @property
    def uses(self) -> frozenset[Fact]:
        return frozenset({"score" if self.metric == SCORE else "metrics"})

    def keep(self, history: Sequence[StepFacts]) -> dict[int, str]:
        known = {facts.step: value for facts in history if (value := facts.value(self.metric)) is not None}
        best = self.ranking(known)[: self.n]
        by = "" if self.metric == SCORE else f" by {self.metric}"
        return {step: f"number {place} of the best{by}: {known[step]}" for place, step in enumerate(best, start=1)}

    def ranking(self, values: Mapping[int, float]) -> list[int]:
        """The steps with these values, the best first."""
        sign = -1 if self.lower_better else 1
        return sorted(values, key=lambda step: (sign * values[step], step), reverse=True)


@dataclass(frozen=True, kw_only=True)
class KeepEvery(Policy):
    """Each step whose number is a multiple of `steps`; or of each stretch of so many `seconds` the first step.

    Stretches are those of the calendar, counted from 1970 on, so that what is kept does not change as steps come and
    go. A step whose time is not known is kept.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("KeepEvery needs steps or seconds, 1 or more; for both join two by |")
        _at_least_one("KeepEvery", self.steps if self.seconds is None else self.seconds)

    @property
    def uses(self) -> frozenset[Fact]:
        return frozenset() if self.seconds is None else frozenset({"created"})

    def keep(self, history: Sequence[StepFacts]) -> dict[int, str]:
        if self.steps:
            return {f.step: f"a multiple of {self.steps}" for f in history if f.step % self.steps == 0}
        return self._first_of_each(history)

    def _first_of_each(self, history: Sequence[StepFacts]) -> dict[int, str]:
        kept: dict[int, str] = {}
        first: dict[int, tuple[float, int]] = {}
        for facts in history:
            at = _seconds(facts.created)
            if at is None:
                kept[facts.step] = "when it was saved is not known"
            else:
                stretch = int(at // (self.seconds or 1))
                first[stretch] = min(first.get(stretch, (at, facts.step)), (at, facts.step))
        return kept | {step: f"the first of {self.seconds:g} seconds" for _, step in first.values()}

    def __str__(self) -> str:
        return f"KeepEvery(steps={self.steps})" if self.steps else f"KeepEvery(seconds={self.seconds:g})"


@dataclass(frozen=True)
class KeepAny(Policy):
    """What any of these keeps; written `KeepLast(3) | KeepBest(2)`."""

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        if not self.policies:
            raise ValueError("KeepAny needs a policy: without one it would keep nothing")

    @property
    def uses(self) -> frozenset[Fact]:
        return frozenset[Fact]().union(*(policy.uses for policy in self.policies))

    @property
    def keeps_all(self) -> bool:
        return any(policy.keeps_all for policy in self.policies)

    def keep(self, history: Sequence[StepFacts]) -> dict[int, str]:
        return _joined([policy.keep(history) for policy in self.policies])

    def keep_model(self, history: Sequence[StepFacts]) -> dict[int, str]:
        return _joined([policy.keep_model(history) for policy in self.policies])

    def __str__(self) -> str:
        return " | ".join(str(policy) for policy in self.policies)


@dataclass(frozen=True)
class PreserveModel(Policy):
    """Of the steps that a policy keeps the models stay, and the rest of them goes:
    `KeepLast(3) | PreserveModel(KeepEvery(steps=1000))`. Such a step is a model for whoever asks for one, and nothing
    that a training goes on from unasked."""

    policy: Policy

    @property
    def uses(self) -> frozenset[Fact]:
        return self.policy.uses

    def keep(self, history: Sequence[StepFacts]) -> dict[int, str]:
        return {}

    def keep_model(self, history: Sequence[StepFacts]) -> dict[int, str]:
        return _joined([self.policy.keep(history), self.policy.keep_model(history)])

    def __str__(self) -> str:
        return f"PreserveModel({self.policy})"


@dataclass(frozen=True, slots=True)
class Decision:
    """Every step of a history is in exactly one of the three."""

    kept: Mapping[int, str]
    """Ascending by step, with all reasons."""
    doomed: tuple[int, ...]
    """Ascending."""
    reduced: Mapping[int, str] = field(default_factory=dict)
    """Of which only the model stays, ascending, with all reasons."""


def decide(policy: Policy, history: Sequence[StepFacts], *, protected: Mapping[int, str] = NOTHING) -> Decision:
    """What to keep, what to delete, and of what to keep only the model.

    The last committed step, pinned ones and protected ones stay whatever the policy says. `protected` gives a reason
    for each such step ("resumed from", "just saved", "the best"); steps that are not in the history are passed over.
    """
    ordered = sorted(history, key=lambda facts: facts.step)
    steps = [facts.step for facts in ordered]
    if len(set(steps)) != len(steps):
        raise ValueError(f"a step is in the history twice: {steps}")
    last = dict.fromkeys(steps[-1:], "the last committed step")
    pinned = {facts.step: "pinned" for facts in ordered if facts.pinned}
    reasons = _joined([last, pinned, protected, policy.keep(ordered)])
    kept = {step: reasons[step] for step in steps if step in reasons}
    models = policy.keep_model(ordered)
    reduced = {step: models[step] for step in steps if step in models and step not in kept}
    return Decision(kept, tuple(step for step in steps if step not in kept and step not in reduced), reduced)


def _joined(reasons: Sequence[Mapping[int, str]]) -> dict[int, str]:
    together: dict[int, str] = {}
    for some in reasons:
        for step, reason in some.items():
            together[step] = f"{together[step]}; {reason}" if step in together else reason
    return together


def yardstick(policy: Policy) -> KeepBest:
    """The first of the policies joined to this one that says what is best; more of the score, if none does."""
    return next((member for member in _members(policy) if isinstance(member, KeepBest)), KeepBest(1))


def prefers_lower(policy: Policy) -> bool:
    """Whether any of the policies that were joined to this one takes lower scores for better ones."""
    by_score = [member for member in _members(policy) if isinstance(member, KeepBest) and member.metric == SCORE]
    return any(member.lower_better for member in by_score)


def _members(policy: Policy) -> tuple[Policy, ...]:
    return policy.policies if isinstance(policy, KeepAny) else (policy,)


def _seconds(created: str | None) -> float | None:
    """Since 1970."""
    try:
        return datetime.fromisoformat((created or "").replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


def _at_least_one(name: str, number: float | None) -> None:
    if not number or number < 1:
        raise ValueError(f"{name}({number}): the number must be 1 or more; to delete nothing use KeepAll()")
