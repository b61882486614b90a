"""Ranks as threads, each with layers of its own, as the stages of a pipeline have them: no process group is needed."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

import shardckpt as sc
from shardckpt.engine.consolidated.write import write_consolidated
from shardckpt.engine.coordinates import Coordinates
from shardckpt.format.manifest import FileEntry
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.open import open_storage
from shardckpt.testing.gangs import run_ranks_settled

RANKS = 3
FOLDER = "step_7"
PATIENT = timedelta(seconds=30)
PLACES = ("memory", "objects", "local", "fsspec")


def make_place(kind: str, folder: Path) -> Storage:
    if kind == "local":
        return LocalStorage(folder)
    if kind == "fsspec":
        return open_storage(f"memory://consolidated/{uuid.uuid4().hex}")
    return MemoryStorage() if kind == "memory" else MemoryObjects()


class Stage(nn.Module):
    """A layer of its own, with a tensor of several windows and small ones of all kinds; and a buffer that all have."""

    def __init__(self, number: int) -> None:
        super().__init__()
        stream = torch.Generator().manual_seed(number)  # threads share torch's own
        self.layers = nn.ModuleDict()
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.randn(700, 1001, generator=stream))
        layer.turned = nn.Parameter(torch.randn(90, 40, generator=stream).t())
        layer.tied = layer.weight
        layer.register_buffer("count", torch.tensor(number))
        layer.register_buffer("empty", torch.zeros(0, 3))
        self.layers[str(number)] = layer
        self.register_buffer("shared", torch.linspace(0, 1, 11))


def expected() -> dict[str, torch.Tensor]:
    """The state of all stages."""
    return {name: value for number in range(RANKS) for name, value in Stage(number).state_dict().items()}


def write_on(
    gangs: sc.Gangs, storage: Storage, model: nn.Module, *, timeout: timedelta = PATIENT, scope: str = "first"
) -> FileEntry | None:
    """On one rank."""
    gangs.root.enter(scope, timeout=PATIENT)
    at = Coordinates.of(gangs)
    return write_consolidated(storage, gangs.root, at, model=model, prefix=FOLDER, step=7, timeout=timeout)


def on_all(act: Callable[[sc.Gangs], Any]) -> list[Any]:
    return run_ranks_settled(RANKS, act, timeout=timedelta(seconds=60))


def load(place: Storage) -> dict[str, torch.Tensor]:
    content = torch.load(io.BytesIO(place.read(f"{FOLDER}/model.pt")), weights_only=True)
    assert content["model_key"] == "model"
    return content["model"]


def is_whole(place: Storage) -> bool:
    """Whether the only file is the consolidated one, and all of it is right."""
    found, wanted = load(place), expected()
    assert place.list(FOLDER) == ["model.pt"]
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
