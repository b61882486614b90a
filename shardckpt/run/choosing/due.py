"""When to save: rules as pure functions of where training is and where it was at the last save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moment:
    """Where training is."""

    step: int
    """Steps that are done."""
    epoch: int = 0
    """Epochs that are done."""
    elapsed_s: float = 0.0
    """Since the last save, by rank 0's clock, as all ranks were last told: they are told in time for a rule that names
    an interval, not at each step."""


class SaveRule(ABC):
    """Says whether a save is due. One of your own needs `due`, and `interval_s` if it looks at the clock.

    Pure, so that all ranks, which are asked with the same moments, answer the same. Joined by `|`: due if any is.
    """

    @abstractmethod
    def due(self, now: Moment, last: Moment) -> str:
        """Why a save is due now, for people; empty if it is not. `last` is where the last save was, or the start."""

    @property
    def interval_s(self) -> float | None:
        """After how many seconds since the last save the answer may change; None if it does not look at the clock."""
        return None

    def __or__(self, other: SaveRule) -> SaveAny:
        if not isinstance(other, SaveRule):
            return NotImplemented
        return SaveAny((*_members(self), *_members(other)))


@dataclass(frozen=True, kw_only=True)
class SaveEvery(SaveRule):
    """Every so many steps, epochs or seconds; with several of them whenever one is due.

    Steps and epochs are counted from 0 on, so that saves lie at multiples whatever was saved in between; if not every
    step is asked about, at the first one after a multiple. Seconds are counted from the last save.
    """

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.steps, self.epochs, self.seconds) if value is not None]
        if not given or any(not value > 0 for value in given):
            raise ValueError(f"{self}: give steps, epochs or seconds, each more than 0")

    @property
    def interval_s(self) -> float | None:
        return self.seconds

    def due(self, now: Moment, last: Moment) -> str:
        if self.steps and now.step // self.steps > last.step // self.steps:
            return f"every {self.steps} steps"
        if self.epochs and now.epoch // self.epochs > last.epoch // self.epochs:
            return f"every {self.epochs} epochs" if self.epochs > 1 else "every epoch"
        if self.seconds and now.elapsed_s >= self.seconds and now.step > last.step:
            return f"every {self.seconds:g} seconds"
        return ""


@dataclass(frozen=True)
class SaveAny(SaveRule):
    """What any of these says; written `SaveEvery(steps=500) | SaveEvery(seconds=600)`."""

    rules: tuple[SaveRule, ...]

    @property
    def interval_s(self) -> float | None:
        return min((rule.interval_s for rule in self.rules if rule.interval_s is not None), default=None)

    def due(self, now: Moment, last: Moment) -> str:
        return "; ".join(reason for rule in self.rules if (reason := rule.due(now, last)))


def next_look(now: Moment, *, interval_s: float, rate_s: float) -> int:
    """The step at which the clock is to be looked at again: half-way, in time, to the end of the interval.

    So an interval takes few looks, however short the steps are, and ends at most a step late if they are even.
    `rate_s`: seconds that a step took lately.
    """
    left = interval_s - now.elapsed_s
    if left <= 0 or rate_s <= 0:
        return now.step + 1
    return now.step + max(1, int(left / rate_s / 2))


def _members(rule: SaveRule) -> tuple[SaveRule, ...]:
    return rule.rules if isinstance(rule, SaveAny) else (rule,)
