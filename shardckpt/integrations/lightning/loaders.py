"""Loaders of data, as they are in a job that was not interrupted: in an epoch, and between two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from shardckpt.state import Stateful


def restore_loaders(loaders: Iterable[Any], states: Sequence[Any], *, epoch: int, begun: bool) -> None:
    """Give loaders their states; the next `iter` then goes on in that epoch, if it had `begun`, or begins it.

    `StatefulDataLoader` of torchdata takes its state up when it is iterated. Of an epoch of known length the last batch
    is the last thing that was asked for, so that it has not noticed the end, and would go on with nothing.
    """
    stateful = [loader for loader in loaders if isinstance(loader, Stateful)]
    for loader, state in zip(stateful, states, strict=True):
        for sampler in _samplers(loader):
            sampler.set_epoch(epoch)
        loader.load_state_dict(state)
        if not begun and isinstance(state, dict) and state.get("_iterator_finished") is False:
            next(iter(loader), None)  # type: ignore[call-overload]  # it notices


def _samplers(loader: Any) -> Iterator[Any]:
    """Those that shuffle anew in each epoch."""
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    for sampler in {id(found): found for found in (getattr(loader, "sampler", None), inner)}.values():
        if hasattr(sampler, "set_epoch"):
            yield sampler


def draw_as_iterators_do(loaders: Iterable[Any]) -> None:
    """A step of the end of an epoch was saved before the next epoch's iterators were made: each draws a seed."""
    for loader in loaders:
        if isinstance(loader, DataLoader):
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
