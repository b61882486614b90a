"""Pipeline stages: each rank has parameters of its own, and another number of stages has them elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardckpt as sc
from tests.distributed.jobs import checkpoints, differences, full

LAYERS = 4
Stages = tuple[int, int]
"""(stages, data-parallel ranks of each)."""


def stage_of(shape: Stages, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, DeviceMesh]:
    """This rank's stage: some of four layers, each with a bias group, sharded over its data-parallel ranks."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp"))
    here = mesh["pp"].get_local_rank()
    torch.manual_seed(seed)
    layers = {str(number): nn.Linear(5, 5) for number in range(LAYERS)}
    mine = range(here * LAYERS // shape[0], (here + 1) * LAYERS // shape[0])
    model = nn.Sequential()
    for number in mine:
        model.add_module(str(number), layers[str(number)])
    if shape[1] > 1:
        fully_shard(model, mesh=mesh["dp"])
    split = [[p for name, p in model.named_parameters() if name.endswith(end)] for end in ("weight", "bias")]
    groups = [{"params": split[0], "lr": 0.1 * (1 + seed)}, {"params": split[1], "lr": 0.2 * (1 + seed)}]
    return model, torch.optim.AdamW(groups, foreach=False), mesh


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All of this rank's stage, by parameter."""
    found: dict[str, Any] = {}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        found |= {name: full(parameter), f"{name} lr": rates[id(parameter)]}
        found |= {f"{name} {key}": full(value) for key, value in optimizer.state[parameter].items()}
    return found


def train_and_save(rank: int, world_size: int, folder: Path, root: Path, shape: Stages) -> dict[str, Any]:
    model, optimizer, mesh = stage_of(shape, 0)
    for _ in range(2):
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(7))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with checkpoints(root, mesh) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer, "step": 2}).result()
    return contents(model, optimizer)


def load(rank: int, world_size: int, folder: Path, root: Path, shape: Stages) -> dict[str, Any]:
    model, optimizer, mesh = stage_of(shape, 1)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    with checkpoints(root, mesh) as manager:
        manager.resume(state)
    assert state["step"] == 2
    return contents(model, optimizer)


@pytest.mark.parametrize("before", [(2, 1), (4, 1), (2, 2)], ids=str)
@pytest.mark.sampled(2)
def test_stages_load_on_any_number_of_stages(ranks, tmp_path, before):
    whole: dict[str, Any] = {}
    for found in ranks.run(before[0] * before[1], train_and_save, tmp_path, before):
        whole |= found
    assert len(whole) == 2 * LAYERS * 5
    for after in [(1, 1), (2, 1), (4, 1), (2, 2), (1, 3)]:
        outcomes = ranks.run(after[0] * after[1], load, tmp_path, after)
        assert {key for found in outcomes for key in found} == whole.keys()
        for found in outcomes:
            assert not list(differences({key: whole[key] for key in found}, found)), f"{before} on {after}"


def load_with_another_layer(rank: int, world_size: int, folder: Path, root: Path) -> list[str]:
    """Rank 1's stage lacks a layer that the checkpoint has, and rank 0's has one that it lacks."""
    model, _, mesh = stage_of((2, 1), 1)
    if rank == 1:
        del model._modules["3"]
    else:
        model.add_module("9", nn.Linear(5, 5))
    with checkpoints(root, mesh) as manager:
        try:
            manager.load(1, {"model": model})
        except sc.CheckpointMismatchError as error:
            return list(error.problems)
    return []


def test_a_layer_that_no_stage_has_is_unexpected(ranks, tmp_path):
    ranks.run(2, train_and_save, tmp_path, (2, 1))
    expected = [
        "missing: model.9.bias",
        "missing: model.9.weight",
        "unexpected: model.3.bias",
        "unexpected: model.3.weight",
    ]
    for problems in ranks.run(2, load_with_another_layer, tmp_path):
        assert sorted(problem.split(" is in ")[0] for problem in problems) == expected
