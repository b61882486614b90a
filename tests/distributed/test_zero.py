"""`ZeroRedundancyOptimizer`: each rank has the moments of some parameters; on other numbers of ranks, and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import shardckpt as sc
from tests.distributed.jobs import differences


def job(seed: int, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model that all ranks have, after a step; its optimizer is whole, or each rank's part of it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 3, bias=False))
    groups = [{"params": list(model[:2].parameters()), "lr": 0.1 + seed}, {"params": list(model[2].parameters())}]
    options: dict[str, Any] = {"lr": 0.2, "foreach": False}
    if kind == "zero":
        options |= {"optimizer_class": torch.optim.AdamW}
    made: type[torch.optim.Optimizer] = ZeroRedundancyOptimizer if kind == "zero" else torch.optim.AdamW
    return model, made(groups, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What this rank has."""
    found: dict[str, Any] = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    state = getattr(optimizer, "optim", optimizer).state
    for name, parameter in model.named_parameters():
        found |= {f"{name} {key}": value.clone() for key, value in state.get(parameter, {}).items()}
    return found | {"rates": [group["lr"] for group in optimizer.param_groups]}


def save(rank: int, world_size: int, folder: Path, root: Path, kind: str) -> dict[str, Any]:
    model, optimizer = job(0, kind)
    step(model, optimizer)
    with sc.CheckpointManager(root, sc.Gangs.from_env()) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer}).result()
    return contents(model, optimizer)


def load(rank: int, world_size: int, folder: Path, root: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a rank has after the load, and after a step."""
    model, optimizer = job(1, kind)
    with sc.CheckpointManager(root, sc.Gangs.from_env()) as manager:
        manager.resume({"model": model, "optimizer": optimizer})
    loaded = contents(model, optimizer)
    step(model, optimizer)
    return loaded, contents(model, optimizer)


@pytest.mark.parametrize("before", [(2, "zero"), (1, "whole")], ids=str)
def test_on_any_number_of_ranks(ranks, tmp_path, before):
    whole: dict[str, Any] = {}
    for found in ranks.run(before[0], save, tmp_path, before[1]):
        whole |= found
    moments = {name for name in whole if " " in name}
    assert len(moments) == 5 * 3
    after: list[torch.Tensor] = []
    for world_size, kind in ((2, "zero"), (3, "zero"), (1, "whole")):
        outcomes = ranks.run(world_size, load, tmp_path, kind)
        assert {name for loaded, _ in outcomes for name in loaded} == whole.keys()
        assert sum(" " in name for loaded, _ in outcomes for name in loaded) == len(moments)
        for loaded, later in outcomes:
            assert not list(differences({name: whole[name] for name in loaded}, loaded)), f"{before} on {kind}"
            after.append(later["0.weight"])
    assert all(torch.equal(after[0], other) for other in after)
