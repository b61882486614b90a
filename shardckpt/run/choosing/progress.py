"""How far training is: steps, epochs, losses, the best value; saved and restored with the state."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

MOST_LOSSES = 1_000


class TrainingProgress:
    """Put it into the state as `"progress": progress`; after `resume` it is where the saved one was.

    Each rank has its own, and gets its own back; in a job of another size all get that of rank 0.

    >>> progress = TrainingProgress()
    >>> progress.advance(loss=0.5)
    >>> progress.step, progress.improves(0.4, lower_better=True), progress.best
    (1, True, 0.4)
    """

    new_world: Literal["first"] = "first"

    def __init__(self, *, most_losses: int = MOST_LOSSES) -> None:
        self.step = 0
        """Steps that are done."""
        self.epoch = 0
        """Epochs that are done."""
        self.best: float | None = None
        """The best value so far, as `improves` was told."""
        self.best_step: int | None = None
        self._losses: deque[tuple[int, float]] = deque(maxlen=most_losses)

    def __repr__(self) -> str:
        return f"TrainingProgress(step={self.step}, epoch={self.epoch}, best={self.best})"

    @property
    def losses(self) -> tuple[tuple[int, float], ...]:
        """Step and loss of the last so many steps that told theirs, ascending."""
        return tuple(self._losses)

    def advance(self, *, loss: float | None = None) -> None:
        """A step is done. `loss` may be a 0-dim tensor: reading it waits for the device."""
        self.step += 1
        if loss is not None:
            self._losses.append((self.step, float(loss)))

    def end_epoch(self) -> None:
        self.epoch += 1

    def improves(self, value: float, *, lower_better: bool = False) -> bool:
        """Whether this value is better than all before it; then it is the best. NaN is never."""
        value = float(value)
        if value != value or (self.best is not None and not (value < self.best if lower_better else value > self.best)):
            return False
        self.best, self.best_step = value, self.step
        return True

    def state_dict(self) -> dict[str, Any]:
        # The losses are one text: each value in a state is an entry of the record.
        return {
            "step": self.step,
            "epoch": self.epoch,
            "best": self.best,
            "best_step": self.best_step,
            "losses": json.dumps(list(self._losses)),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        losses = [(int(step), float(loss)) for step, loss in json.loads(state_dict["losses"])]
        self.step, self.epoch = int(state_dict["step"]), int(state_dict["epoch"])
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self._losses = deque(losses, maxlen=self._losses.maxlen)
