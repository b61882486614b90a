"""Weights & Biases: charts over steps, the newest checkpoint in the summary, an alert when a save has failed."""

from __future__ import annotations

from typing import Any

from shardckpt.engine.events.facts import name_of, numbers_of, problem_of
from shardckpt.engine.events.kinds import Committed, Event, SaveSkipped


class WandB:
    """Subscribe it on the rank that has the run, rank 0: `checkpoints.subscribe(WandB(run))`.

    Charts have a step of their own, `checkpoint/step`: a save is told when training is some steps further, and W&B
    drops what is told of an earlier step than the last. So that it does not move the program's own step either, it goes
    into the row that the program logs next (`commit=False`).

    Args:
        run: what `wandb.init` gave; it stays the program's. Offline runs, too.
        prefix: the section that the charts are in.
    """

    def __init__(self, run: Any, *, prefix: str = "checkpoint") -> None:
        self._run, self._prefix = run, prefix
        run.define_metric(f"{prefix}/step", hidden=True)
        run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")

    def __call__(self, event: Event) -> None:
        if event.rank != 0:
            return
        numbers, problem = numbers_of(event), problem_of(event)
        if numbers:
            row = {f"{self._prefix}/{name}": value for name, value in numbers.items()}
            self._run.log({f"{self._prefix}/step": event.step, **row}, commit=False)
        if isinstance(event, Committed):
            self._run.summary.update({f"{self._prefix}/url": event.url})
        if problem and not isinstance(event, SaveSkipped):
            self._run.alert(f"{self._prefix}: step {event.step} {name_of(event)}", problem, level="ERROR")
