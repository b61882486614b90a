"""TensorBoard: scalars over steps, and what went wrong as text."""

from __future__ import annotations

from typing import Any

from shardckpt.engine.events.facts import name_of, numbers_of, problem_of
from shardckpt.engine.events.kinds import Event


class TensorBoard:
    """Subscribe it on rank 0 (on others it says nothing): `checkpoints.subscribe(TensorBoard(writer))`.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter` (or tensorboardX's), which stays the program's.
        prefix: the group that the charts are in.
    """

    def __init__(self, writer: Any, *, prefix: str = "checkpoint") -> None:
        self._writer, self._prefix = writer, prefix

    def __call__(self, event: Event) -> None:
        if event.rank != 0:
            return
        numbers, problem = numbers_of(event), problem_of(event)
        for name, value in numbers.items():
            self._writer.add_scalar(f"{self._prefix}/{name}", value, event.step, walltime=event.at)
        if problem:
            text = f"**{name_of(event)}**: {problem}"
            self._writer.add_text(f"{self._prefix}/problems", text, event.step, walltime=event.at)
        if numbers or problem:
            self._writer.flush()  # the program may be killed at any time
