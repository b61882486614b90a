"""When is a copy needed? Parameters and optimizer state change only in `optimizer.step()`: so only that must wait."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from shardckpt.engine.pending import PendingSave
from shardckpt.state import OptimizerOf, Part


class StepHooks:
    """Holds the next step of every optimizer of the state until the save under way has copied what it changes."""

    def __init__(self) -> None:
        self._handles: weakref.WeakKeyDictionary[torch.optim.Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()
        self._pending: PendingSave | None = None

    def install(self, parts: Sequence[Part], pending: PendingSave) -> None:
        """Called on the training's thread, before `save` returns."""
        self._pending = pending
        for part in parts:
            if isinstance(part.owner, OptimizerOf) and part.owner.optimizer not in self._handles:
                self._handles[part.owner.optimizer] = part.owner.optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _before_step(self, *_: Any) -> None:
        if self._pending is not None:
            self._pending.wait_until_staged()


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
        for values in optimizer.state.values():
            addresses.update(_address(value) for value in values.values() if isinstance(value, torch.Tensor))
    return frozenset(addresses - {0})


def _address(tensor: torch.Tensor) -> int:
    return getattr(tensor, "_local_tensor", tensor).data_ptr()
