"""`save_total_limit`, as Trainer means it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shardckpt.run.retention import Policy, StepFacts


@dataclass
class KeepTotal(Policy):
    """So many steps in all: the last one, the best one, and of the others the newest. All, for no limit or 0.

    With a limit of 1 two may stay, the last and the best, as there: the last is needed to resume.
    """

    limit: int | None
    bests: list[int] = field(default_factory=list)
    """The steps that were the best when they were saved, in order. The last one that is committed counts: a new best
    whose save is under way, or fails, does not cost the one before. Rank 0's trainer appends to it."""
    stale: set[int] = field(default_factory=set)
    """Of another training in the same place: as if they were older than all others, which, by time, they are."""

    def keep(self, history: Sequence[StepFacts]) -> dict[int, str]:
        steps = sorted((facts.step for facts in history), key=lambda step: (step not in self.stale, step))
        if not self.limit or self.limit < 0:
            return dict.fromkeys(steps, "save_total_limit is not set")
        kept = {step: "the best" for step in reversed(self.bests) if step in steps}
        kept = dict([*kept.items()][:1])
        kept |= {step: "the last" for step in steps[-1:] if step not in kept}
        for step in reversed(steps):
            if len(kept) >= self.limit:
                break
            kept.setdefault(step, f"one of {self.limit} in all")
        return kept
