"""Every optimizer of torch comes back as it was, and goes on as if nothing had happened; one table."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import shardckpt as sc
from shardckpt.engine.loading.optimizers import read_saved, restore_optimizer
from shardckpt.optimizers import OptimizerOf, optimizer_tree
from shardckpt.state import Part
from tests.manager.transactions import same

Make = Callable[[nn.Module], optim.Optimizer]


def plainly(kind: type[optim.Optimizer], **options: Any) -> Make:
    def make(model: nn.Module) -> optim.Optimizer:
        matrices_only = kind.__name__ == "Muon"
        return kind([p for p in model.parameters() if p.ndim == 2 or not matrices_only], **options)

    return make


def by_name(model: nn.Module) -> optim.Optimizer:
    """Groups that know the names of their parameters (torch 2.6 and newer)."""
    named = list(model.named_parameters())
    biases = [(name, parameter) for name, parameter in named if name.endswith("bias")]
    rest = [(name, parameter) for name, parameter in named if not name.endswith("bias")]
    return optim.AdamW([{"params": biases, "lr": 0.1}, {"params": rest}], lr=0.01)


def added_later(model: nn.Module) -> optim.Optimizer:
    first, *rest = model.parameters()
    made = optim.Adam([first], lr=0.01)
    made.add_param_group({"params": rest, "lr": 0.02})
    return made


def some_frozen(model: nn.Module) -> optim.Optimizer:
    next(model.parameters()).requires_grad_(False)
    return optim.AdamW(model.parameters(), lr=0.01)


KINDS = sorted(
    name
    for name, kind in vars(optim).items()
    if isinstance(kind, type) and issubclass(kind, optim.Optimizer) and kind is not optim.Optimizer
)
ROWS: dict[str, Make] = {name: plainly(getattr(optim, name)) for name in KINDS}
FLAGS: dict[str, Make] = {
    f"{kind.__name__} {flag}": plainly(kind, lr=0.01, **{flag: True}, **more)
    for kind, more in ((optim.AdamW, {}), (optim.SGD, {"momentum": 0.9}), (optim.Adagrad, {}))
    for flag in ("foreach", "fused", "amsgrad", "nesterov", "maximize")
    if flag in inspect.signature(kind).parameters
}
ROWS |= {
    "RMSprop centred, momentum": plainly(optim.RMSprop, momentum=0.9, centered=True),
    "LBFGS, long memory": plainly(optim.LBFGS, history_size=20, max_iter=3, line_search_fn="strong_wolfe"),
    "rate in a tensor": plainly(optim.AdamW, lr=torch.tensor(0.01), foreach=False),
    "groups by name": by_name,
    "added later": added_later,
    "some frozen": some_frozen,
}


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def step(model: nn.Module, optimizer: optim.Optimizer, number: int) -> None:
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = model(inputs).square().mean()
        value.backward()
        if isinstance(optimizer, optim.SparseAdam):
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad = parameter.grad.to_sparse()
        return value

    optimizer.step(loss) if isinstance(optimizer, optim.LBFGS) else (loss(), optimizer.step())


CASES = [(name, *steps) for name in ROWS for steps in ((0, 0), (3, 0), (3, 2))] + [(name, 3, 0) for name in FLAGS]


@pytest.mark.parametrize(("name", "before", "since"), CASES)
def test_it_goes_on_as_if_nothing_had_happened(tmp_path: Path, name: str, before: int, since: int) -> None:
    """Saved before the first step or after some; loaded into a new one, or one that has gone on."""
    make = (ROWS | FLAGS)[name]
    model, optimizer = (made := net(0)), make(made)
    for number in range(before):
        step(model, optimizer, number)
    other, twin = (made := net(1)), make(made)
    for number in range(10, 10 + since):
        step(other, twin, number)
    other.zero_grad()
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer}).result()
        manager.resume({"model": other, "optimizer": twin})
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(twin.state_dict(), optimizer.state_dict())
    for number in range(20, 22):
        step(model, optimizer, number)
        step(other, twin, number)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_a_rate_in_a_tensor_stays_that_tensor(tmp_path: Path) -> None:
    """A compiled or captured step has its address."""
    model, other = net(0), net(1)
    rate, more = torch.tensor(0.25), {"fused": False, "foreach": False}
    twin = optim.AdamW(other.parameters(), lr=rate, **more)
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as manager:
        manager.save(1, {"model": model, "optimizer": optim.AdamW(model.parameters(), lr=torch.tensor(0.5), **more)})
        manager.wait()
        manager.resume({"model": other, "optimizer": twin})
    assert twin.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


CAPTURED: dict[str, Any] = {"capturable": True, "foreach": False}


def test_a_captured_step_comes_back(tmp_path: Path) -> None:
    """It cannot be taken on the host: what a device has made of it is put in by hand."""
    model, other = net(0), net(1)
    optimizer, twin = (optim.AdamW(made.parameters(), **CAPTURED) for made in (model, other))
    for number, parameter in enumerate(model.parameters()):
        optimizer.state[parameter] = {"step": torch.tensor(3.0)}
        optimizer.state[parameter] |= {k: torch.full_like(parameter, number) for k in ("exp_avg", "exp_avg_sq")}
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer}).result()
        manager.resume({"model": other, "optimizer": twin})
    assert same(twin.state_dict(), optimizer.state_dict())
    assert twin.param_groups[0]["capturable"]


@pytest.mark.parametrize("option", ["capturable", "fused", "neither"])
def test_steps_are_counted_where_they_are_taken(option: str) -> None:
    """The optimizer was made to count on the host, and its saved options say otherwise; "meta" is the device."""
    module = nn.Linear(2, 2, device="meta")
    optimizer = optim.AdamW(module.parameters(), foreach=False)
    for parameter in module.parameters():
        optimizer.state[parameter] = {"step": torch.tensor(3.0)}
    owner = OptimizerOf(optimizer, module, {id(p): name for name, p in module.named_parameters()}, was_empty=False)
    part = Part(("optimizer",), "optimizer", owner, optimizer_tree(optimizer, owner.names))
    groups = [{**part.tree["param_groups"][0], option: True}]
    restore_optimizer(part, read_saved([{"state": {}, "param_groups": groups}]), ())
    expected = "cpu" if option == "neither" else "meta"
    assert {values["step"].device.type for values in optimizer.state.values()} == {expected}


def test_a_parameter_that_was_added_after_the_save(tmp_path: Path) -> None:
    """Its group is named; with `missing="keep"` it keeps what it has, and the others get theirs."""
    model, other = net(0), net(1)
    first = optim.Adam([model[0].weight], lr=0.5)  # type: ignore[index]
    twin = optim.Adam([other[0].weight], lr=0.25)  # type: ignore[index]
    step(model, first, 0)
    twin.add_param_group({"params": [other[2].weight], "lr": 0.125})  # type: ignore[index]
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as manager:
        manager.save(1, {"model": model, "optimizer": first}).result()
        with pytest.raises(sc.CheckpointLoadError, match=r"no group of optimizer with the parameters 2\.weight"):
            manager.resume({"model": other, "optimizer": twin})
        manager.resume({"model": other, "optimizer": twin}, policy=sc.LoadPolicy(missing="keep"))
    assert [group["lr"] for group in twin.param_groups] == [0.5, 0.125]
    assert same(twin.state_dict()["state"][0], first.state_dict()["state"][0])
