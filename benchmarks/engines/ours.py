"""This project's engine."""

from __future__ import annotations

from collections.abc import Mapping

import shardckpt as sc
from benchmarks.engines.seam import Started
from benchmarks.places import Place
from benchmarks.states import State
from shardckpt.storage import LocalStorage


class Shardckpt:
    """Every save is asynchronous and durable; a synchronous one waits for its result.

    There is no other kind. For what peers do without a sync, its writes go through the page cache, and the job makes
    its syncs do nothing (see `benchmarks.gauges.unsynced`).
    """

    def __init__(self, state: State, root: Place, *, durable: bool, in_place: bool = False) -> None:
        self._policy = sc.LoadPolicy(in_place=in_place)
        self._state = state.live
        self._root = root
        self._manager = sc.CheckpointManager(root.url if durable else LocalStorage(root.path, write="buffered"))
        self._last: sc.PendingSave | None = None

    def start(self, step: int) -> Started:
        self._last = self._manager.save(step, self._state)
        return _OwnSave(self._last)

    def save(self, step: int) -> None:
        self.start(step).result()

    def load(self, step: int) -> None:
        self._manager.load(step, self._state, policy=self._policy)

    def place(self, step: int) -> Place:
        return self._root / f"step_{step}"

    def phases(self) -> Mapping[str, float]:
        if self._last is None:
            return {}
        report = self._last.report
        return {name: getattr(report, f"{name}_s") for name in ("stall", "stage", "write", "commit", "total")}

    def close(self) -> None:
        self._manager.close()


class _OwnSave:
    def __init__(self, pending: sc.PendingSave) -> None:
        self._pending = pending

    def before_update(self) -> None:
        self._pending.staged()

    def done(self) -> bool:
        return self._pending.done()

    def result(self) -> None:
        self._pending.result()
