"""Optimizers that are not in the textbook: groups without parameters, parameters without state, loads that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import shardckpt as sc
from tests.distributed.jobs import Layout, checkpoints, full

HYBRID, SHARDED, FEWER, SINGLE = Layout(4, 1, "hsdp"), Layout(4), Layout(2), Layout(1)


class Odd(nn.Module):
    """One used layer, one that is never used, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 5)
        self.unused = nn.Linear(6, 5, bias=False)
        self.frozen = nn.Linear(6, 5, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.used(x)
        return y


def model_on(layout: Layout, seed: int) -> tuple[Odd, DeviceMesh]:
    """Sharded if there is more than one rank."""
    torch.manual_seed(seed)
    model, mesh = Odd(), layout.mesh()
    if layout.ranks > 1:
        fully_shard(model, mesh=mesh if layout.data == "hsdp" else mesh["dp"])
    return model, mesh


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(3)
    model(torch.randn(2, 6, generator=generator)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What there is of state, by parameter name, and the hyperparameters of the groups."""
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = full(value) if isinstance(value, torch.Tensor) else value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return found | {"groups": groups, "sizes": [len(group["params"]) for group in optimizer.param_groups]}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    pairs = [(one[key], other[key]) for key in one]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def adamw(model: Odd, *, lr: float) -> torch.optim.Optimizer:
    """Groups that lost all their parameters, as happens where a rule chooses them by name; all of different rates."""
    groups: list[dict[str, Any]] = [{"params": [], "lr": 3 * lr}, {"params": list(model.parameters())}]
    return torch.optim.AdamW([*groups, {"params": [], "lr": 2 * lr}, {"params": []}], lr=lr, foreach=False)


def momentum(model: Odd, *, lr: float) -> torch.optim.Optimizer:
    """Its state is one sharded tensor for each parameter and nothing else."""
    return torch.optim.SGD([model.used.weight], lr=lr, momentum=0.9)


MAKERS = {"adamw": adamw, "momentum": momentum}


def save(rank: int, world_size: int, folder: Path, root: Path, layout: Layout, kind: str, steps: int) -> None:
    model, mesh = model_on(layout, 0)
    optimizer = MAKERS[kind](model, lr=0.1)
    for _ in range(steps):
        step(model, optimizer)
    with checkpoints(root, mesh) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer}).result()
    whole = held(model, optimizer)
    if rank == 0:
        torch.save(whole, root / "reference.pt")


def load(rank: int, world_size: int, folder: Path, root: Path, layout: Layout, kind: str, steps: int) -> str:
    """Into an optimizer that has taken some steps; what is wrong."""
    model, mesh = model_on(layout, 1)
    optimizer = MAKERS[kind](model, lr=0.7)
    for _ in range(steps):
        step(model, optimizer)
    with checkpoints(root, mesh) as manager:
        manager.resume({"model": model, "optimizer": optimizer})
    found, expected = held(model, optimizer), torch.load(root / "reference.pt", weights_only=True)
    return "" if same(found, expected) else f"{found}\nis not\n{expected}"


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "after two"])
@pytest.mark.sampled(2)
def test_what_an_optimizer_holds_comes_back_and_no_more(ranks, tmp_path, kind, steps):
    """A parameter that had no state has none after the load, either; and a group is that group."""
    ranks.run(4, save, tmp_path, HYBRID, kind, steps)
    for layout in (HYBRID, SHARDED, FEWER, SINGLE):
        for wrong in ranks.run(layout.ranks, load, tmp_path, layout, kind, 0):
            assert not wrong, f"on {layout}: {wrong}"


def test_into_an_optimizer_that_has_stepped(ranks, tmp_path):
    """What it had of its own is gone, also where the checkpoint has nothing in its place."""
    ranks.run(4, save, tmp_path, SHARDED, "adamw", 0)
    assert ranks.run(2, load, tmp_path, FEWER, "adamw", 1) == ["", ""]


def load_in_vain(rank: int, world_size: int, folder: Path, root: Path, policy: sc.LoadPolicy | None) -> str:
    """Into groups of other parameters, or of a step that is damaged: what changed although it was refused."""
    model, mesh = model_on(FEWER, 1)
    if policy is None:
        optimizer = adamw(model, lr=0.7)
    else:
        both = [{"params": [model.used.weight, model.unused.weight]}]
        optimizer = torch.optim.AdamW(both, lr=0.7, foreach=False)
    before = {name: full(parameter) for name, parameter in model.named_parameters()}
    with checkpoints(root, mesh) as manager, pytest.raises(sc.CheckpointLoadError) as caught:
        manager.load(1, {"model": model, "optimizer": optimizer}, policy=policy)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(full(parameter), before[name])]
    state = [name for name, parameter in model.named_parameters() if parameter in optimizer.state]
    return f"{changed} changed, state of {state} made: {caught.value}" if changed or state else str(caught.value)


def test_a_load_that_fails_leaves_an_optimizer_without_state_as_it_was(ranks, tmp_path):
    """A step that was counted but never taken would change every step after it."""
    ranks.run(4, save, tmp_path, SHARDED, "adamw", 2)
    (tmp_path / "step_1" / "rank_2.pt").unlink()
    for told in ranks.run(2, load_in_vain, tmp_path, None):
        assert told.startswith("step 1")
        assert "rank_2.pt" in told


def test_other_groups_are_found_out_before_anything_changes(ranks, tmp_path):
    ranks.run(4, save, tmp_path, SHARDED, "adamw", 2)
    policy = sc.LoadPolicy(unexpected="ignore", missing="keep")
    (tmp_path / "other").mkdir()
    ranks.run(4, save_two_groups, tmp_path / "other")
    for told in ranks.run(2, load_in_vain, tmp_path / "other", policy):
        assert told.startswith("step 1")
        assert "used.weight and unused.weight: group the parameters" in told


def save_two_groups(rank: int, world_size: int, folder: Path, root: Path) -> None:
    """The used and the unused weight in one group, with others."""
    model, mesh = model_on(SHARDED, 0)
    used, unused = model.used, model.unused
    groups = [{"params": [used.weight, used.bias], "lr": 0.1}, {"params": [model.frozen.weight], "lr": 0.2}]
    optimizer = torch.optim.AdamW([*groups, {"params": [unused.weight], "lr": 0.3}], foreach=False)
    step(model, optimizer)
    with checkpoints(root, mesh) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer}).result()
