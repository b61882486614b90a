"""The saves under way: in what order they came, which memory each has, and what a new one does about them."""

from __future__ import annotations

from collections.abc import Callable

from shardckpt.engine.background.policy import SavePolicy
from shardckpt.engine.pending import PendingSave
from shardckpt.engine.saving.stage import Stager
from shardckpt.engine.saving.work import Work
from shardckpt.errors import CheckpointSkippedError


class Flights:
    """On every rank by itself, on the training's thread.

    Ranks do not agree here whether there is room: one may have heard of a commit that another has not heard of yet. A
    rank that skips a save, or gives one up, says so where all ranks meet for that save (`CheckpointSkippedError`), and
    it is then skipped on all. So nobody is held up to agree.
    """

    def __init__(self, make_stager: Callable[[], Stager]) -> None:
        self._make_stager = make_stager
        self._stagers: list[Stager] = []
        self._works: list[Work] = []

    @property
    def last(self) -> PendingSave | None:
        """The save that was started last."""
        return self._works[-1].pending if self._works else None

    def make_room(self, step: int, policy: SavePolicy) -> CheckpointSkippedError | None:
        """Before a save is started; may wait. Gives the reason why it is to be skipped, if it is."""
        under_way = self._under_way()
        if len(under_way) >= policy.in_flight and policy.when_busy != "wait":
            busy = ", ".join(str(work.pending.step) for work in under_way)
            if policy.when_busy == "skip":
                return CheckpointSkippedError(f"step {step} was skipped: step {busy} is still being saved", step=step)
            for work in under_way:
                reason = f"step {work.pending.step} was given up for step {step}, since it was not committed yet"
                work.pending.progress.stop(CheckpointSkippedError(reason, step=work.pending.step))
        room = policy.in_flight + (policy.when_busy == "replace")
        while len(under_way) >= room:
            under_way[0].pending.wait()
            under_way = self._under_way()
        return None

    def memory(self) -> Stager:
        """For a save that is about to be staged: memory that none of those under way uses."""
        used = [work.stager for work in self._under_way()]
        free = next((stager for stager in self._stagers if stager not in used), None)
        if free is None:
            free = self._make_stager()
            self._stagers.append(free)
        return free

    def add(self, work: Work) -> None:
        """It is under way from now on."""
        self._works = [*self._under_way(), work]

    def under_way(self) -> list[PendingSave]:
        """Those that are not over yet, in order."""
        return [work.pending for work in self._under_way()]

    def of_step(self, step: int) -> PendingSave | None:
        """The save of that step that was started last, if it is among those under way or is the last one."""
        found = [work.pending for work in self._works if work.pending.step == step]
        return found[-1] if found else None

    def drain(self) -> None:
        """Wait until no save is under way. Raises nothing."""
        for work in self._works:
            work.pending.wait()

    def wait_until_staged(self) -> None:
        """Hold whoever wants to change parameters until all copies are done; a copy that hangs is given up."""
        for work in self._works:
            if not work.pending.wait_until_staged(work.limit.work):
                work.give_up_copy()
            work.hold()

    def close(self) -> None:
        """Give the memory back."""
        for stager in self._stagers:
            stager.close()

    def _under_way(self) -> list[Work]:
        return [work for work in self._works if not work.pending.done()]
