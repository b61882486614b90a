"""The dry run of a load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from typing import Any

from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.engine.loading.selecting.report import LoadPlan
from shardckpt.engine.save import Saver
from shardckpt.format.manifest import Manifest
from shardckpt.manager.finding import Finder
from shardckpt.manager.talk import Talk
from shardckpt.state import Part


class PlanningFace(ABC):
    """Called by all ranks, in the same order, on the training's thread."""

    _saver: Saver
    _talk: Talk
    _finder: Finder

    @abstractmethod
    def _take_apart(self, state: MutableMapping[str, Any], manifest: Manifest, policy: LoadPolicy) -> list[Part]:
        """The parts of a state that is to be loaded, on all ranks or on none."""

    def plan(self, step: int, state: MutableMapping[str, Any], *, policy: LoadPolicy | None = None) -> LoadPlan:
        """What `load` would do with that step: what would be read, by whom, what would change and what not, and every
        difference, without raising it. Nothing changes and no tensor is read; all ranks get the same."""
        self._saver.drain()
        self._talk.enter(f"plan/{step}", step=step)
        folder, manifest = self._finder.record(step)
        policy = policy or LoadPolicy()
        parts = self._take_apart(state, manifest, policy)
        return self._finder.loader(folder, manifest).plan(parts, policy)
