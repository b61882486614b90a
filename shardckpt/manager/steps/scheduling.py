"""`schedule`: when a save is due, the same on all ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from shardckpt.manager.talk import Talk
from shardckpt.run.choosing.due import Moment, SaveRule, next_look

_log = logging.getLogger(__name__)


class SchedulingFace:
    """`schedule`."""

    _talk: Talk

    def schedule(self, rule: SaveRule, *, step: int = 0, epoch: int = 0) -> Schedule:
        """Ask it after each step whether a save is due. `step`, `epoch`: where training starts, as `resume` said.

        Made by all ranks, which ask it about the same steps in the same order.
        """
        return Schedule(rule, Moment(step, epoch), talk=self._talk)


class Schedule:
    """A rule, and where the last save was. On the training's thread of every rank.

    For steps and epochs no rank needs to ask another. A clock is rank 0's: it tells the others, at steps on which all
    of them have agreed before, few in each interval.
    """

    def __init__(
        self, rule: SaveRule, start: Moment, *, talk: Talk, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rule, self._last, self._talk, self._clock = rule, start, talk, clock
        self._interval_s = rule.interval_s
        self._elapsed_s = 0.0
        self._look_at = start.step + 1
        self._saved_at = self._looked_at = clock()
        self._looked_step = start.step

    def due(self, step: int, *, epoch: int = 0) -> bool:
        """Whether to save now. If so, it counts from here on."""
        now = self._now(step, epoch)
        reason = self._rule.due(now, self._last)
        if reason:
            _log.info("step %d is to be saved: %s", step, reason)
            self.saved(step, epoch=epoch)
        return bool(reason)

    def saved(self, step: int, *, epoch: int = 0) -> None:
        """Count from here on: something else has had it saved."""
        self._last = Moment(step, epoch)
        self._saved_at, self._elapsed_s = self._clock(), 0.0
        self._look_at = min(self._look_at, step + 1)

    def _now(self, step: int, epoch: int) -> Moment:
        now = Moment(step, epoch, self._elapsed_s)
        if self._interval_s is None or step < self._look_at:
            return now
        self._talk.enter("clock", step=step)
        self._elapsed_s, self._look_at = self._talk.from_rank_0(lambda: self._look(now), "look at the clock", step=step)
        return replace(now, elapsed_s=self._elapsed_s)

    def _look(self, now: Moment) -> list[float | int]:
        """Of rank 0: the time since the last save, and the step of the next look."""
        assert self._interval_s is not None
        at = self._clock()
        rate_s = (at - self._looked_at) / max(1, now.step - self._looked_step)
        self._looked_at, self._looked_step = at, now.step
        now = replace(now, elapsed_s=at - self._saved_at)
        return [now.elapsed_s, next_look(now, interval_s=self._interval_s, rate_s=rate_s)]
