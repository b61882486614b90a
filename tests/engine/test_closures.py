"""A step that is given a closure: its forward and backward need not wait for the copy, the update does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from shardckpt.engine.saving.hooks import StepHooks
from shardckpt.optimizers import OptimizerOf
from shardckpt.state import Part

NEEDS = {"SparseAdam"}
"""Other gradients than those here."""


def optimizers() -> Iterator[tuple[str, Callable[..., torch.optim.Optimizer]]]:
    for name in sorted(torch.optim.__all__ if hasattr(torch.optim, "__all__") else dir(torch.optim)):
        kind = getattr(torch.optim, name, None)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            yield name, kind


def hooked(kind: Callable[..., torch.optim.Optimizer], log: list[str]) -> tuple[Any, Any, StepHooks]:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = kind([weight], lr=0.1)
    hooks = StepHooks(lambda: log.append("wait" if torch.equal(weight, torch.ones(3, 3)) else "too late"))
    hooks.install([Part(("optimizer",), "optimizer", OptimizerOf(optimizer, torch.nn.Module(), {}, False), {})])
    return optimizer, weight, hooks


@pytest.mark.parametrize(("name", "kind"), [pair for pair in optimizers() if pair[0] not in NEEDS])
def test_torchs_own_change_nothing_before_the_closure(name: str, kind: Callable[..., torch.optim.Optimizer]) -> None:
    log: list[str] = []
    optimizer, weight, hooks = hooked(kind, log)
    before = copy.deepcopy((weight.detach(), list(optimizer.state.values())))

    def closure() -> torch.Tensor:
        if not log:
            torch.testing.assert_close((weight.detach(), tensors(optimizer)), (before[0], tensors_of(before[1])))
        log.append("closure")
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert log[:2] == ["closure", "wait"]
    assert float(loss.detach()) == 9
    assert not torch.equal(weight, torch.ones(3, 3))
    hooks.remove()
    log.clear()
    optimizer.step(closure=lambda: log.append("closure") or weight.square().sum())
    assert set(log) == {"closure"}


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return tensors_of(list(optimizer.state.values()))


def tensors_of(states: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [value for values in states for value in values.values() if isinstance(value, torch.Tensor)]


class Sharpness(torch.optim.SGD):
    """One that moves the weights before it calls the closure."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1)
        return super().step(closure)


def test_without_a_closure_the_step_waits_at_once() -> None:
    log: list[str] = []
    optimizer, weight, hooks = hooked(torch.optim.SGD, log)
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    assert log == ["wait"]
    hooks.remove()


def test_an_optimizer_that_is_not_torchs_waits_at_once() -> None:
    log: list[str] = []
    optimizer, _, hooks = hooked(Sharpness, log)
    optimizer.step(lambda: log.append("closure"))
    assert (log[0], log[-1]) == ("wait", "closure")
    hooks.remove()
