"""What is to be trained, and what came of it. Imports no framework: whoever only asks for a training has this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

Layout = Literal["one", "parts", "fsdp2"]
STEPS = 10


@dataclass(frozen=True)
class Plan:
    folder: str
    layout: Layout = "one"
    config: Mapping[str, Any] = field(default_factory=dict)
    kill_at: int = -1
    steps: int = STEPS
    load_step: int = -1
    theirs: bool = False
    """Torchtitan's own checkpointer, in the same place."""
    in_backward: bool = False
    environ: Mapping[str, str] = field(default_factory=dict)

    def but(self, **changes: Any) -> Plan:
        return replace(self, **changes)


@dataclass
class Result:
    losses: dict[int, float]
    loaded: bool
    model: dict[str, torch.Tensor]
    """In full tensors, by the names of the whole."""
    hub: dict[str, torch.Tensor]
    """The same, by those of Hugging Face."""


def train(rank: int, world_size: int, folder: Path, plan: Plan) -> Result:
    """By a forked rank."""
    from tests.integrations.titan.training import train as really

    return really(rank, world_size, folder, plan)
