"""Preemption: a signal to one rank, and all ranks stop at one common step, which is saved in time."""

from __future__ import annotations

import logging
import signal
import time
from datetime import timedelta

from shardckpt.engine.events.kinds import StopAgreed
from shardckpt.engine.events.stream import EventStream
from shardckpt.engine.save import Saver
from shardckpt.errors import InvalidOperationError
from shardckpt.gang.gangs import Gangs
from shardckpt.gang.halt import Decision, Halt
from shardckpt.manager.signals import SignalWatch
from shardckpt.manager.talk import Talk

_log = logging.getLogger(__name__)

_USUAL = (signal.SIGTERM, signal.SIGUSR1)
"""What Slurm, Kubernetes, torchrun and people send before they kill."""
_SHARE = 5
"""A rank waits for the others' agreement for this part of the budget at most, three times at most."""
_LEAST = timedelta(seconds=1)
"""However little is left of the budget, a phase of the last save may take this long."""


class StoppingFace:
    """`stop_on`, `request_stop`, `should_stop`."""

    _gangs: Gangs
    _saver: Saver
    _talk: Talk
    _events: EventStream
    _stop: Stop | None = None

    def stop_on(self, *signals: int, budget: timedelta = timedelta(seconds=30)) -> None:
        """Have a signal to any rank end the training of all ranks at one common step; see `should_stop`.

        Called once, by all ranks, on the main thread. Handlers that the program has set before are called, too; `close`
        puts them back. A signal that comes again changes nothing, for launchers send on what they get.

        Args:
            signals: SIGTERM and SIGUSR1 if none are given.
            budget: from the first signal on, how long agreeing, a save still under way and the last save may take
                together. It should end before the SIGKILL comes.
        """
        if self._stop is not None:
            raise InvalidOperationError("stop_on was called before: give it all signals at once")
        self._stop = Stop(self._gangs.fork("stop"), signals or _USUAL, budget, self._events)

    def request_stop(self, reason: str = "the program asked for it") -> None:
        """What a signal does, for notices that come in another way. By any thread of any rank, after `stop_on`."""
        if self._stop is None:
            raise InvalidOperationError("call stop_on() first, on all ranks")
        self._stop.request(reason)

    def should_stop(self, step: int) -> bool:
        """Whether this is the last step: save it, and leave. The same on all ranks.

        Asked by all ranks about every step, on the training's thread, before saving it. As long as no signal has come,
        this takes about a microsecond; once, after one has come, it waits until the ranks have agreed. When it is
        True, an earlier save that is still under way has had its share of the budget (or has been cancelled), and no
        phase of the next save may take longer than what is left.
        """
        if self._stop is None or not self._stop.asked(step):
            return False
        self._stop.make_way(self._saver)
        left = max(self._stop.left(), _LEAST)
        self._saver.timeout = min(self._saver.timeout, left)
        self._talk.timeout = min(self._talk.timeout, left)
        return True

    def _in_budget(self, deadline: timedelta | None) -> timedelta | None:
        """The deadline of a save, if it is the last one no later than the end of the budget."""
        left = self._left_of_budget()
        return deadline if left is None else left if deadline is None else min(deadline, left)

    def _left_of_budget(self) -> timedelta | None:
        """None if the ranks have not agreed to stop."""
        return max(self._stop.left(), _LEAST) if self._stop is not None and self._stop.agreed else None

    def _stop_watching(self) -> None:
        if self._stop is not None:
            self._stop.close()


class Stop:
    """One rank's part: its signals, the agreement with the others, and the time that is left."""

    def __init__(self, gangs: Gangs, signals: tuple[int, ...], budget: timedelta, events: EventStream) -> None:
        self._events = events
        self._budget_s = budget.total_seconds()
        self._ends = float("inf")
        self._halt = Halt(gangs.root, patience=budget / _SHARE, on_decision=self._told)
        self._signals = SignalWatch(signals, self.request)

    def request(self, reason: str) -> None:
        """In a signal handler or any thread."""
        self._ends = min(self._ends, time.monotonic() + self._budget_s)
        self._halt.request(reason)

    def asked(self, step: int) -> bool:
        return self._halt.ask(step)

    @property
    def agreed(self) -> bool:
        return self._halt.decision is not None

    def left(self) -> timedelta:
        """Of the budget."""
        return timedelta(seconds=max(0.0, self._ends - time.monotonic()))

    def make_way(self, saver: Saver) -> None:
        """Let earlier saves end in half of the time that is left; then cancel this rank's part, and so the save."""
        for earlier in saver.under_way():
            if not earlier.wait(self.left() / 2):
                text = "step %d is still being written, but the last step is more urgent: it is cancelled"
                _log.warning(text, earlier.step)
                earlier.cancel()
                earlier.wait(self.left() / 2)

    def close(self) -> None:
        self._signals.close()
        self._halt.close()

    def _told(self, decision: Decision) -> None:
        self._ends = min(self._ends, time.monotonic() + self._budget_s)
        self._events.tell(StopAgreed, decision.step, reason=decision.reason, absent=decision.absent)
        _log.warning("%s: all ranks stop at step %d, or the next one they ask about", decision.reason, decision.step)
