"""What Lightning hands to a `CheckpointIO`: a dict, on rank 0, and a path. Each path is a run of which one step stays.

So what lies at a path is whole or absent, also while it is being replaced, and opens with everything that opens a run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from shardckpt.engine.background.policy import SavePolicy
from shardckpt.engine.pending import PendingSave
from shardckpt.errors import CheckpointError
from shardckpt.gang.gangs import Gangs
from shardckpt.manager.checkpoints import CheckpointManager
from shardckpt.run.retention import KeepLast

_log = logging.getLogger(__name__)

_MODEL = "state_dict"
"""The key of the model in Lightning's dict."""


@dataclass(slots=True)
class _Flight:
    path: str
    manager: CheckpointManager
    pending: PendingSave


class TheIO:
    """Mixed into Lightning's `CheckpointIO`. Saves and removals come on rank 0, loads on every rank by itself."""

    def __init__(self, *, storage_options: Mapping[str, object] | None, other: Any) -> None:
        self._options, self._other = storage_options, other
        self._flight: _Flight | None = None
        self._doomed: list[str] = []
        """To be removed once the save under way is committed."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Returns when all of it has been copied; it is written and committed in the background."""
        self._land()
        manager = self._manager(path, storage_options)
        try:
            latest = manager.latest()
            step = 0 if latest is None else latest + 1  # the newest one is what the path stands for
            pending = manager.save(step, checkpoint, model_key=_MODEL)
        except BaseException:
            with suppress(CheckpointError):
                manager.close()
            raise
        self._flight = _Flight(os.fspath(path), manager, pending)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Tensors on the CPU. What is no checkpoint of ours is loaded as Lightning does."""
        self._land()
        with closing(self._manager(path)) as manager:
            if _steps(manager):
                return dict(manager.load_last_checkpoint()[1])
        # Lightning 2.5 has no `weights_only` here, and does not ask for it.
        asked = {} if weights_only is None else {"weights_only": weights_only}
        return dict(self._other.load_checkpoint(path, map_location=map_location, **asked))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Lightning removes one when it has handed over what takes its place: so it goes when that is committed."""
        self._doomed.append(os.fspath(path))
        if self._flight is None:
            self._remove_doomed()

    def teardown(self) -> None:
        """At the end of a run of the trainer."""
        self._land()

    def _land(self) -> None:
        """Wait for the save under way. Its failure is raised, and then nothing is removed for it."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            flight.manager.close()
        except CheckpointError:
            if self._doomed:
                _log.error("%s stay, since %s was not saved", ", ".join(self._doomed), flight.path)
            self._doomed.clear()
            raise
        self._remove_doomed()

    def _remove_doomed(self) -> None:
        doomed, self._doomed = self._doomed, []
        for path in doomed:
            self._remove(path)

    def _remove(self, path: str) -> None:
        with closing(self._manager(path)) as manager:
            steps = _steps(manager)
            for step in steps:
                manager.delete_checkpoint(step)
        if not steps:
            self._other.remove_checkpoint(path)
        elif "://" not in path:
            with suppress(OSError):  # whatever else lies there stays
                os.rmdir(path)

    def _manager(self, path: str | os.PathLike[str], options: Any | None = None) -> CheckpointManager:
        saving = SavePolicy(staging="blocking")  # whose tensors these are is not known here
        given = options if options is not None else self._options
        return CheckpointManager(path, Gangs.local(), keep=KeepLast(1), saving=saving, storage_options=given)


def _steps(manager: CheckpointManager) -> list[int]:
    """None where there is no run of ours, such as a file of Lightning's own."""
    try:
        return manager.steps()
    except (CheckpointError, OSError):
        return []
