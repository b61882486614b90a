"""What an engine is, to a job that measures it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmarks.places import Place
from benchmarks.states import State


class Engine(Protocol):
    """Saves so that the bytes are on the device when it returns (if that was asked for), and loads into the state."""

    def save(self, step: int) -> None: ...

    def load(self, step: int) -> None: ...

    def place(self, step: int) -> Place:
        """Where the files of a step lie."""

    def phases(self) -> Mapping[str, float]:
        """What the engine itself says of its last save on this rank, in seconds; empty if it says nothing."""

    def close(self) -> None: ...


class Started(Protocol):
    """An asynchronous save under way."""

    def before_update(self) -> None:
        """Called before the optimizer step: returns when the state may change."""

    def done(self) -> bool:
        """Whether everything is written."""

    def result(self) -> None:
        """Returns when everything is written."""


class AsyncEngine(Engine, Protocol):
    """One that can also save while training goes on."""

    def start(self, step: int) -> Started: ...


class Peer:
    """What the peers have in common: a dict of tensors, a folder for each step."""

    def __init__(self, state: State, root: Place, *, durable: bool) -> None:
        self._state = state
        self._tensors = {name: tensor.detach() for name, tensor in state.tensors.items()}
        """As `Module.state_dict` gives them: without gradients, in the same memory."""
        self._root = root
        self._durable = durable

    def place(self, step: int) -> Place:
        return self._root / f"step_{step}"

    def phases(self) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        pass


class FutureSave:
    """A save that has copied the state before it returned, and is over when a future is."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def before_update(self) -> None:
        """Nothing to wait for."""

    def done(self) -> bool:
        return bool(self._future.done())

    def result(self) -> None:
        self._future.result()


def sync_all(place: Place) -> None:
    """Make a finished step durable: files, folders, and the folder above."""
    paths = [path for path in place.path.rglob("*") if not path.is_symlink()]
    for path in [*paths, place.path, place.path.parent]:
        sync(path)


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
