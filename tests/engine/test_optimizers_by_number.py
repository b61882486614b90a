"""State that was saved by the numbers of parameters, as `Optimizer.state_dict()` has it, into live optimizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import shardckpt as sc
from tests.engine.test_every_optimizer import added_later, by_name, net, plainly, some_frozen, step
from tests.manager.transactions import same

BY_NUMBER = sc.LoadPolicy(optimizers="by_number")
MAKERS: dict[str, Callable[[nn.Module], optim.Optimizer]] = {
    "AdamW": plainly(optim.AdamW, lr=0.01),
    "no state": plainly(optim.SGD, lr=0.5),
    "momentum": plainly(optim.SGD, lr=0.5, momentum=0.9),
    "two groups, not in the model's order": by_name,
    "added later": added_later,
    "some frozen": some_frozen,
    "lists of tensors": plainly(optim.LBFGS, history_size=3, max_iter=3),
    "a rate in a tensor": plainly(optim.AdamW, lr=torch.tensor(0.25), foreach=False),
}


def trained(make: Callable[[nn.Module], optim.Optimizer], seed: int, steps: int) -> tuple[nn.Module, optim.Optimizer]:
    model = net(seed)
    optimizer = make(model)
    for number in range(steps):
        step(model, optimizer, number)
    return model, optimizer


@pytest.mark.parametrize("since", [0, 2])
@pytest.mark.parametrize("name", MAKERS)
def test_a_file_of_torch_save_resumes_in_one(tmp_path: Path, name: str, since: int) -> None:
    """As what a script saved becomes a run: converted, and resumed. The next saves are by name, and resume alike."""
    make = MAKERS[name]
    model, optimizer = trained(make, 0, 3)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("param_names", None)  # of a script that did not give them; with them `convert` takes the names
    torch.save({"model": model.state_dict(), "optimizer": state, "epoch": 4}, tmp_path / "old.pt")
    sc.convert(tmp_path / "old.pt", tmp_path / "run", step=3)
    for _ in range(2):
        other, twin = trained(make, 1, since)
        with sc.CheckpointManager(tmp_path / "run") as manager:
            resumed = manager.resume({"model": other, "optimizer": twin}, policy=BY_NUMBER)
            assert resumed is not None
            found = twin.state_dict()
            for group in found["param_groups"]:
                group.pop("param_names", None)
            assert same(found, state)
            assert same(dict(other.state_dict()), dict(model.state_dict()))
            manager.save(resumed.step + 1, {"model": other, "optimizer": twin}).result()
    for number in range(20, 22):
        step(model, optimizer, number)
        step(other, twin, number)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def saved(folder: Path, optimizer: optim.Optimizer, model: nn.Module) -> None:
    with sc.CheckpointManager(folder) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer.state_dict()}).result()


def resume(folder: Path, state: dict[str, Any], **options: Any) -> Any:
    with sc.CheckpointManager(folder) as manager:
        return manager.resume(state, policy=sc.LoadPolicy(optimizers="by_number", **options))


def test_under_another_key(tmp_path: Path) -> None:
    model, optimizer = trained(MAKERS["AdamW"], 0, 2)
    saved(tmp_path, optimizer, model)
    other, twin = trained(MAKERS["AdamW"], 1, 0)
    resume(tmp_path, {"net": other, "opt": twin}, rename={"net": "model", "opt": "optimizer"})
    assert same(twin.state_dict(), optimizer.state_dict())


def test_groups_that_are_made_otherwise_are_found_out(tmp_path: Path) -> None:
    """Another order of other shapes, fewer parameters, more of them: one error each, and nothing changes."""
    model, optimizer = trained(MAKERS["AdamW"], 0, 2)
    saved(tmp_path, optimizer, model)
    turned = net(1)
    for parameters, told in (
        (
            [*turned.parameters()][::-1],
            r"shape: optimizer\.state\.3\.exp_avg \(optimizer\.state\.0\.weight\.exp_avg in",
        ),
        ([*turned.parameters()][:2], r"unexpected: optimizer\.state\.2\.exp_avg"),
        ([*turned.parameters(), nn.Parameter(torch.ones(1))], "no group of optimizer with the parameters extra"),
    ):
        extra = parameters[4:]
        if extra:
            turned.register_parameter("extra", extra[0])
        twin = optim.AdamW(parameters, lr=0.75)
        with pytest.raises(sc.CheckpointLoadError, match=told):
            resume(tmp_path, {"optimizer": twin, "model": turned}, exclude=["model"])
        assert not twin.state
        assert twin.param_groups[0]["lr"] == 0.75


def test_the_policy_has_two_words_for_it() -> None:
    with pytest.raises(ValueError, match="by_name or by_number"):
        sc.LoadPolicy(optimizers="numbers")  # type: ignore[arg-type]
