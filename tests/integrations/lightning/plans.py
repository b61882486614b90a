"""What is to be trained, and what came of it. Imports no framework: whoever only asks for a training has this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

Layout = Literal["one", "ddp", "fsdp2", "tp"]
EPOCH = 5
"""Steps of an epoch on two data-parallel ranks; twice as many on one."""


@dataclass(frozen=True)
class Plan:
    """What to train, and how to save it."""

    root: str
    layout: Layout = "one"
    saved: Mapping[str, Any] = field(default_factory=lambda: {"every_n_train_steps": 3})
    ckpt_path: str | None = None
    kill_at: int = -1
    epochs: int = 3
    plain_loader: bool = False
    plugin: bool = False
    """Lightning's own `ModelCheckpoint`, over our `CheckpointIO`."""
    theirs: bool = False
    """Lightning's own, with nothing of ours."""
    then_test: str = ""
    """After the training test what this `ckpt_path` names."""
    terms: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Plan:
        return replace(self, **changes)


@dataclass
class Result:
    losses: dict[int, float]
    """By global step."""
    best: str
    last: str
    state: dict[str, torch.Tensor]
    """The module, in full tensors."""
    seen: dict[str, Any] = field(default_factory=dict)


def train(rank: int, world_size: int, folder: Path, plan: Plan) -> Result:
    """By a forked rank."""
    from tests.integrations.lightning.training import train as really

    return really(rank, world_size, folder, plan)
