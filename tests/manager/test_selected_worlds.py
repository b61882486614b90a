"""Selections and other names together with what else a load knows: rules for a new world, extra states, optimizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import shardckpt as sc
from tests.engine.test_odd_models import Extra
from tests.manager.test_new_world import Counts, save_numbers, total
from tests.manager.transactions import Size, equal, on_ranks, same

DROPPED = "dropped for another number of ranks, as new_world says"
NOT_SELECTED = "not included, or excluded"
RULES: dict[str, Any] = {"amount": total, "tensor": "drop"}


@pytest.mark.parametrize("in_place", [False, True])
def test_rules_for_what_has_another_name(tmp_path: Path, in_place: bool) -> None:
    """The plan says it beforehand, and the load does it."""
    save_numbers(tmp_path, Size(2))
    rename = {"tally": "counts", "amount": "value"}
    policy = sc.LoadPolicy(new_world=RULES, exclude=["nested"], rename=rename, in_place=in_place)

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> Any:
        state: dict[str, Any] = {"tally": Counts(0), "amount": 0, "tensor": torch.tensor(5), "nested": {"a": [0]}}
        plan = manager.plan(1, state, policy=policy)
        untouched = (state["tally"].number, state["amount"]) == (0, 0)
        info = manager.load(1, state, policy=policy)
        own = [state["tally"].number, state["amount"], state["tensor"].item(), state["nested"]]
        left = {"tensor": DROPPED, "nested.a": NOT_SELECTED}
        told = (plan.changed, plan.dropped, plan.problems, dict(plan.left) == info.left == left, untouched)
        return own, told

    told = (("amount", "tally"), ("nested.a", "tensor"), (), True, True)
    expected = [([7, 100 * rank + 21, 5, {"a": [0]}], told) for rank in range(3)]
    assert on_ranks(Size(3), tmp_path, act) == expected


def test_an_optimizer_that_is_dropped_is_as_fresh_as_it_was(tmp_path: Path) -> None:
    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> Any:
        model = nn.Linear(2, 1)
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        optimizer = optim.Adam(model.parameters())
        if gangs.root.size == 2:
            model(torch.ones(2)).sum().backward()
            optimizer.step()
            manager.save(1, {"optimizer": optimizer, "model": model}).result()
            return None
        policy = sc.LoadPolicy(new_world={"optimizer": "drop"})
        left = manager.load(1, {"model": model, "optimizer": optimizer}, policy=policy).left
        return left, len(optimizer.state)

    on_ranks(Size(2), tmp_path, act)
    assert on_ranks(Size(1), tmp_path, act) == [({"optimizer": DROPPED}, 0)]


def save_extra(root: Path, value: Any) -> None:
    with sc.CheckpointManager(root, sc.Gangs.local()) as manager:
        manager.save(1, {"model": nn.ModuleDict({"encoder": Extra(value), "head": Extra(1)})}).result()


def test_an_extra_state_by_another_name(tmp_path: Path) -> None:
    value = {"scale": torch.ones(3), "names": ["a"], "encoder": {}}
    save_extra(tmp_path, value)
    body, head = Extra({"scale": torch.zeros(1)}), Extra(2)
    state = {"model": nn.ModuleDict({"body": body, "head": head})}
    policy = sc.LoadPolicy(rename={"model.body": "model.encoder"}, exclude=["model.head._extra_state"])
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as manager:
        plan = manager.plan(1, state, policy=policy)
        info = manager.load(1, state, policy=policy)
    equal(body.value, value)
    assert head.value == 2
    assert plan.changed == ("model.body._extra_state", "model.body.weight", "model.head.weight")
    assert plan.left == info.left == {"model.head._extra_state": NOT_SELECTED}
    assert plan.dropped == ("model.head._extra_state",)


def test_an_extra_state_is_loaded_as_a_whole(tmp_path: Path) -> None:
    save_extra(tmp_path, {"scale": torch.ones(3), "count": 3})
    state = {"model": nn.ModuleDict({"encoder": Extra({"scale": torch.zeros(3), "count": 0}), "head": Extra(0)})}
    policy = sc.LoadPolicy(exclude=["model.encoder._extra_state.count"])
    with (
        sc.CheckpointManager(tmp_path, sc.Gangs.local()) as manager,
        pytest.raises(sc.CheckpointMismatchError, match=r"model\.encoder\._extra_state is loaded as a whole or not"),
    ):
        manager.load(1, state, policy=policy)


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "lists of tensors": lambda params: optim.LBFGS(params, history_size=3, max_iter=3),
    "a rate in a tensor": lambda params: optim.AdamW(params, lr=torch.tensor(0.5), foreach=False),
}


def net(seed: int, name: str) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({name: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_by_other_names_in_any_optimizer(tmp_path: Path, name: str) -> None:
    """Also where tensors are made anew, for there are none to load into."""
    model, other = net(0, "encoder"), net(1, "body")
    optimizer, twin = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model["encoder"](torch.ones(4, 3)).square().sum()  # type: ignore[index]
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    twin.param_groups[0]["lr"] = twin.param_groups[0]["lr"] * 2
    rename = {"model.body": "model.encoder", "optimizer.state.body": "optimizer.state.encoder"}
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer}).result()
        manager.load(1, {"model": other, "optimizer": twin}, policy=sc.LoadPolicy(rename=rename))
    assert same(list(other.state_dict().values()), list(model.state_dict().values()))
    assert same(twin.state_dict(), optimizer.state_dict())


def test_a_new_parameter_beside_renamed_ones(tmp_path: Path) -> None:
    """With `missing="keep"` its group stays, and the others are found by their other names."""
    model, other = net(0, "encoder"), net(1, "body")
    optimizer = optim.Adam(model.parameters(), lr=0.5)
    model["encoder"](torch.ones(4, 3)).sum().backward()  # type: ignore[index]
    optimizer.step()
    other["new"] = nn.Linear(1, 1)  # type: ignore[index]
    twin = optim.Adam(other["body"].parameters(), lr=0.25)  # type: ignore[index]
    twin.add_param_group({"params": list(other["new"].parameters()), "lr": 0.125})  # type: ignore[index]
    rename = {"model.body": "model.encoder", "optimizer.state.body": "optimizer.state.encoder"}
    policy = sc.LoadPolicy(missing="keep", rename=rename)
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer}).result()
        left = manager.load(1, {"model": other, "optimizer": twin}, policy=policy).left
    assert [group["lr"] for group in twin.param_groups] == [0.5, 0.125]
    assert same({i: twin.state_dict()["state"][i] for i in range(4)}, optimizer.state_dict()["state"])
    assert {"model.new.weight", "model.new.bias"} <= set(left)
