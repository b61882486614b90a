"""Several parts of a model, of one or more pipeline stages on this rank, as one; and several optimizers as one.

So that names do not depend on how many parts a rank has: another pipeline layout finds them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from shardckpt.errors import InvalidStateError


def whole_module(parts: Sequence[nn.Module]) -> nn.Module:
    """The part, or a tree that has the modules of all parts at their places: for names and state, not to be run."""
    return parts[0] if len(parts) == 1 else _Whole([_unwrapped(part) for part in parts])


def whole_optimizer(optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """The optimizer, or one that has the groups and the state of all; what steps are the optimizers themselves."""
    return optimizers[0] if len(optimizers) == 1 else _Optimizers(optimizers)


class _Whole(nn.Module):
    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self._parts = tuple(parts)
        _graft(self, parts, "")

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As the parts give it, by their own hooks."""
        return {name: value for part in self._parts for name, value in part.state_dict(*args, **kwargs).items()}


def _graft(target: nn.Module, parts: Sequence[nn.Module], path: str) -> None:
    """Give it the parameters, buffers and modules that these have at this path."""
    children: dict[str, list[nn.Module]] = {}
    for part in parts:
        for name, parameter in part._parameters.items():
            _unique(target, name, path)
            target.register_parameter(name, parameter)
        for name, buffer in part._buffers.items():
            if name not in target._buffers:  # each stage has its own copy of what all compute with
                target.register_buffer(name, buffer, persistent=name not in part._non_persistent_buffers_set)
        for name, child in part._modules.items():
            if child is not None:
                children.setdefault(name, []).append(child)
    for name, found in children.items():
        if len(found) == 1:
            target.add_module(name, found[0])
        else:
            target.add_module(name, inner := nn.Module())
            _graft(inner, found, f"{path}{name}.")


def _unique(target: nn.Module, name: str, path: str) -> None:
    if name in target._parameters:
        raise InvalidStateError(
            f"two parts of the model have the parameter {path}{name}: which of them is to be saved?"
        )


def _unwrapped(part: nn.Module) -> nn.Module:
    """Without DDP, and without the compiler's wrapper."""
    while type(part).__name__ in ("DistributedDataParallel", "OptimizedModule"):
        part = part.module if hasattr(part, "module") else part._orig_mod  # type: ignore[assignment]
    return part


class _Optimizers(torch.optim.Optimizer):
    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([parameter for group in _groups(optimizers) for parameter in group["params"]], {})
        self._optimizers = tuple(optimizers)
        self.param_groups = _groups(optimizers)
        self.state = _States(optimizers)  # type: ignore[assignment]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for optimizer in self._optimizers:
            optimizer.step(closure)

    def register_step_pre_hook(self, hook: Any) -> Any:
        return _Handles([optimizer.register_step_pre_hook(hook) for optimizer in self._optimizers])


def _groups(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The very dicts that the optimizers have."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


class _Handles:
    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _States(MutableMapping[torch.Tensor, Any]):
    """State by parameter, in the optimizer that has the parameter; made when it is first asked for, as theirs is."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._all = [optimizer.state for optimizer in optimizers]
        self._home = {id(p): o.state for o in optimizers for group in o.param_groups for p in group["params"]}

    def __getitem__(self, parameter: torch.Tensor) -> Any:
        return self._home[id(parameter)][parameter]

    def __setitem__(self, parameter: torch.Tensor, values: Any) -> None:
        self._home[id(parameter)][parameter] = values

    def __delitem__(self, parameter: torch.Tensor) -> None:
        del self._home[id(parameter)][parameter]

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._home.get(id(parameter), ())

    def get(self, parameter: torch.Tensor, default: Any = None) -> Any:
        state: Mapping[torch.Tensor, Any] = self._home.get(id(parameter), {})
        return state.get(parameter, default)

    def pop(self, parameter: torch.Tensor, *default: Any) -> Any:
        return self._home[id(parameter)].pop(parameter, *default)

    def clear(self) -> None:
        for state in self._all:
            state.clear()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (parameter for state in self._all for parameter in state)

    def __len__(self) -> int:
        return sum(map(len, self._all))
