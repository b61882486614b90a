"""Runs for these tests, saved by the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import shardckpt as sc
from shardckpt.storage.base import Storage
from tests.manager.transactions import Size, on_ranks, state_of, transact


def small_state(number: float) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((2, 3), number), "bias": torch.full((3,), -number)},
        "optimizer": {"momentum": torch.full((2, 3), number / 2)},
        "rng": {"seed": int(number)},
    }


def save(root: str | Path | Storage, *steps: int, **options: Any) -> None:
    """One process saves these steps."""
    with sc.CheckpointManager(root, **options) as manager:
        for step in steps:
            manager.save(step, small_state(step)).result()


def assert_loads(root: str | Path | Storage, step: int, **options: Any) -> None:
    """What `save` saved comes back, bit for bit."""
    state = small_state(0)
    with sc.CheckpointManager(root, **options) as manager:
        manager.load(step, state)
    for part in ("model", "optimizer"):
        for name, tensor in small_state(step)[part].items():
            assert torch.equal(state[part][name], tensor), name
    assert state["rng"] == {"seed": step}


def save_on(size: Size, root: str | Path | Storage, *steps: int) -> None:
    """Ranks as threads save these steps."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        for step in steps:
            transact(manager, step, state_of(gangs, ("model",), base=step), replicated_keys={"model"})

    on_ranks(size, root, act)
