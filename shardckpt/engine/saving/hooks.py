"""When is a copy needed? Parameters and optimizer state change only in `optimizer.step()`: so only that must wait."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from shardckpt.optimizers import OptimizerOf
from shardckpt.state import Part


class StepHooks:
    """Has the steps of every optimizer of the state wait until the saves under way have copied what they change."""

    def __init__(self, wait: Callable[[], None]) -> None:
        """`wait` is called before each step, on the thread of the step."""
        self._wait = wait
        self._handles: weakref.WeakKeyDictionary[torch.optim.Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()

    def install(self, parts: Sequence[Part]) -> None:
        """Called on the training's thread, before `save` returns."""
        for part in parts:
            if isinstance(part.owner, OptimizerOf) and part.owner.optimizer not in self._handles:
                self._handles[part.owner.optimizer] = part.owner.optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Torch's own optimizers change nothing before they have called the closure, if they are given one. That is
        where the forward and backward of a step may be (Lightning has them there), and those need not wait."""
        closure = kwargs.get("closure", args[1] if len(args) == 2 else None)
        if closure is None or not f"{type(optimizer).__module__}.".startswith("torch.optim."):
            self._wait()
            return None

        def then_wait() -> Any:
            loss = closure()
            self._wait()
            return loss

        return (args[:1], {**kwargs, "closure": then_wait})


def memory_of_optimizers(parts: Sequence[Part]) -> frozenset[int]:
    """Addresses of the tensors that change only in `step()` of an optimizer of the state: parameters and moments.

    A parameter that no optimizer of the state updates is not among them: something unknown may change it.
    """
    addresses: set[int] = set()
    for part in parts:
        if not isinstance(part.owner, OptimizerOf):
            continue
        optimizer = part.owner.optimizer
        for group in optimizer.param_groups:
            addresses.update(_address(parameter) for parameter in group["params"])
        for values in part.owner.holder.state.values():
            addresses.update(_address(value) for value in values.values() if isinstance(value, torch.Tensor))
    return frozenset(addresses - {0})


def _address(tensor: torch.Tensor) -> int:
    return getattr(tensor, "_local_tensor", tensor).data_ptr()
