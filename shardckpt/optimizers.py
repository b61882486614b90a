"""An optimizer as part of a state: its content by parameter name, and which object has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict as torch_state

from shardckpt.split import Rule


@dataclass(frozen=True, slots=True)
class OptimizerOf:
    """An optimizer and the module whose parameters it updates."""

    optimizer: torch.optim.Optimizer
    module: torch.nn.Module
    names: Mapping[int, str]
    """What torch calls each parameter of the module, by its id."""
    was_empty: bool
    """It had no state when it was taken apart."""

    @property
    def holder(self) -> torch.optim.Optimizer:
        """The optimizer that has the state: of a `ZeroRedundancyOptimizer` that of this rank's parameters."""
        return holder_of(self.optimizer)


def owner_of(optimizer: torch.optim.Optimizer, modules: Iterable[torch.nn.Module]) -> torch.nn.Module | None:
    """The module of the state that has all parameters of the optimizer; None if there is no such module."""
    wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module in modules:
        if wanted and wanted <= {id(p) for p in module.parameters()}:
            return module
    return None


def holder_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Asked by name: `torch.distributed.optim` takes long to import, and who has such an optimizer has done so.

    Its own `state_dict` would gather all of it on one rank, on the training's groups.
    """
    is_zero = any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)
    return getattr(optimizer, "optim", optimizer) if is_zero else optimizer


def all_own(key: str, state: Mapping[str, Mapping[str, Any]]) -> dict[str, Rule]:
    """Each rank has what the others have not."""
    return {f"{key}.state.{name}.{kind}": "own" for name, values in state.items() for kind in values}


def make_state(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer make its state, by a step that changes nothing; it has none still if it cannot do that.

    LBFGS wants a closure, SparseAdam sparse gradients: what torch has set for the step is then undone.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    had_gradients = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    try:
        torch_state.get_optimizer_state_dict(module, optimizer)
    except Exception:
        if had_gradients:
            raise
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group.update({} if rate is None else {"lr": rate})
        optimizer.state.clear()
        optimizer.zero_grad(set_to_none=True)


def optimizer_tree(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """The optimizer's state by parameter name, in the form of `get_optimizer_state_dict`; tensors are not copies.

    2026-11: that function takes a step if there is no state yet; a run that is saved before its first step would
    then no longer be the run itself.
    """
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [names[id(p)] for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    state = {names[id(parameter)]: dict(values) for parameter, values in holder_of(optimizer).state.items()}
    return {"state": state, "param_groups": groups}
