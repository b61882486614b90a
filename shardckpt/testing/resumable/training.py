"""What runs on the ranks of a check: train and save, or make everything anew, load, and go on training."""

from __future__ import annotations

import random
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.gang.gangs import Gangs
from shardckpt.manager.checkpoints import CheckpointManager
from shardckpt.testing.resumable.marks import Marks, marks_of

Shape = tuple[int, ...]
"""Of a mesh of ranks; what its dimensions mean is for `make` to say."""


@dataclass
class Training:
    """A training as it stands on one rank, in the middle of a job."""

    state: MutableMapping[str, Any]
    """What it hands to `CheckpointManager.save` and `resume`."""
    step: Callable[[], float]
    """Trains one step; gives the loss of this rank. Takes its data from what `state` restores."""
    gangs: Gangs | None = None
    """For the `CheckpointManager`: `Gangs.from_mesh(mesh)`, say; `Gangs.from_env()` if not given."""


Make = Callable[[Shape], Training]


@dataclass(frozen=True)
class Seen:
    """What one rank saw after a step; `loss` is None where the step was loaded, or has just been saved."""

    step: int
    loss: float | None
    marks: Marks


def train_and_save(
    rank: int, world_size: int, folder: Path, make: Make, shape: Shape, root: Path, steps: tuple[int, int]
) -> list[Seen]:
    """Train, save, and go on as if nothing had happened. On every rank of a pool."""
    _stir(rank)
    training = make(shape)
    with CheckpointManager(root, training.gangs) as checkpoints:
        for _ in range(steps[0]):
            training.step()
        checkpoints.save(steps[0], training.state).result()
        return _go_on(training, steps)


def load_and_train(
    rank: int,
    world_size: int,
    folder: Path,
    make: Make,
    shape: Shape,
    root: Path,
    steps: tuple[int, int],
    policy: LoadPolicy | None,
) -> list[Seen]:
    """Load what was saved into a training that was made anew, and go on. On every rank of a pool."""
    _stir(1_000_003 + rank)
    training = make(shape)
    with CheckpointManager(root, training.gangs) as checkpoints:
        checkpoints.load(steps[0], training.state, policy=policy)
        return _go_on(training, steps)


def _go_on(training: Training, steps: tuple[int, int]) -> list[Seen]:
    done, more = steps
    seen = [Seen(done, None, marks_of(training.state))]
    for number in range(done + 1, done + more + 1):
        loss = training.step()
        seen.append(Seen(number, float(loss), marks_of(training.state)))
    return seen


def _stir(seed: int) -> None:
    """Set every random stream to what no other process has: what is made anew must get it from the checkpoint."""
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        import numpy as np
    except ImportError:
        return
    np.random.seed(seed)
