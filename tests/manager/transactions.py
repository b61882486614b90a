"""What the tests of the transactional face share: states of ranks, whole transactions, and what a folder holds."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

import shardckpt as sc
from shardckpt.storage.base import Storage
from shardckpt.testing.gangs import run_ranks

T = TypeVar("T")

NEVER = timedelta(hours=1)
"""A deadline that no test reaches: a rank that waits for it is one that hangs, and `run_ranks` says so."""


@dataclass(frozen=True)
class Size:
    """A job of dp x tp ranks, tp fastest."""

    dp: int
    tp: int = 1

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    def __str__(self) -> str:
        return f"{self.dp}x{self.tp}"


def on_ranks(
    size: Size,
    root: str | Path | Storage | Callable[[int], Storage],
    act: Callable[[sc.CheckpointManager, sc.Gangs], T],
) -> list[T]:
    """`act` with a manager on every rank, each a thread; what it gives, by rank. `root` may differ by rank."""

    def run(gangs: sc.Gangs) -> T:
        own = root(gangs.root.rank) if callable(root) else root
        with sc.CheckpointManager(own, gangs, timeout=NEVER) as manager:
            return act(manager, gangs)

    return run_ranks(size.ranks, run, tp=size.tp)


def state_of(
    gangs: sc.Gangs, alike: Collection[str] = (), *, base: int = 0, model_key: str = "model"
) -> dict[str, Any]:
    """A state in fairseq2's form. Ranks of a dp gang hold alike what is in `alike` ("*": all), and nothing else;
    ranks of other shards hold other numbers everywhere."""

    def number(key: str) -> int:
        own = 0 if is_declared(key, alike) else 10 * (1 + gangs.dp.rank)
        return base + 1000 * gangs.tp.rank + own

    def tensors(key: str) -> dict[str, torch.Tensor]:
        first = number(key)
        return {
            "layer.weight": torch.arange(12.0).view(3, 4) + first,
            "layer.bias": torch.full((3,), first, dtype=torch.bfloat16),
            "seen": torch.tensor(first),
        }

    moments = {"step": torch.tensor(3.0), "exp_avg": tensors("optimizer")["layer.weight"]}
    groups = [{"lr": 0.5 + number("optimizer"), "betas": (0.9, 0.95), "foreach": None, "params": [0]}]
    return {
        model_key: tensors(model_key),
        "optimizer": {"state": {0: moments}, "param_groups": groups},
        "step_nr": number("step_nr"),
        "epoch": number("epoch"),
    }


def is_declared(key: str, replicated: Collection[str]) -> bool:
    return key in replicated or "*" in replicated


def same(one: Any, other: Any) -> bool:
    """Whether two states are the same: keys, types, and tensors bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def equal(one: Any, other: Any) -> None:
    """`same`, and both are shown if they are not."""
    assert same(one, other), f"{one}\n!=\n{other}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def transact(manager: sc.CheckpointManager, step: int, state: Mapping[str, Any], **options: Any) -> None:
    """A whole transaction with nothing but a state in it."""
    manager.begin_checkpoint(step)
    manager.save_state(state, **options)
    manager.commit_checkpoint()


def files_in(folder: Path) -> set[str]:
    """All files below a folder, by their path in it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def opened(folder: Path) -> dict[str, dict[str, Any]]:
    """Every archive of a step, as torch alone and a zip tool read it."""
    return {path.name: content for path, content in _archives(folder)}


def _archives(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in folder.glob("*.pt"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None, path.name
        yield path, torch.load(path, mmap=True, weights_only=True)
