"""Which step to load: the newest good one, the best, one that is named, or one of another run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from functools import partial
from typing import Any, cast

from shardckpt.engine.loading.fit import LoadPolicy
from shardckpt.engine.pending import CheckpointInfo
from shardckpt.engine.save import Saver
from shardckpt.errors import GangError
from shardckpt.format.manifest import Manifest
from shardckpt.manager.finding import Finder, ModelOnlyError, check_asks_for_model_only
from shardckpt.manager.talk import Talk
from shardckpt.run.history import History
from shardckpt.state import Part, StateReader


class ResumingFace(ABC):
    """`resume`, `load`, `steps`, `latest`. All are called by all ranks, in the same order, on the training's thread."""

    _saver: Saver
    _reader: StateReader
    _talk: Talk
    _finder: Finder
    _history: History

    @abstractmethod
    def get_step_numbers(self) -> list[int]:
        """The committed steps, in order."""

    def resume(
        self,
        state: MutableMapping[str, Any],
        *,
        policy: LoadPolicy | None = None,
        allow_fresh_start: bool = False,
    ) -> CheckpointInfo | None:
        """Load the newest step that is good on all ranks; None if the run has no step at all.

        A damaged step is passed over, and the log and the result say why. If there are steps but none is good, that
        is an error and no silent fresh start, unless `allow_fresh_start`.
        """
        steps = reversed(self.steps())
        load = partial(self.load, state=state, policy=policy)
        found = self._finder.first_good(steps, load, fresh=allow_fresh_start)
        if found is None:
            return None
        step, info = found
        self._history.protect(step, "the step that was resumed from")
        return cast(CheckpointInfo, info)

    def load(self, step: int, state: MutableMapping[str, Any], *, policy: LoadPolicy | None = None) -> CheckpointInfo:
        """Load that step into the state: all of it on all ranks, or nothing on any."""
        self._saver.drain()
        self._talk.enter(f"load/{step}", step=step)
        folder, manifest = self._finder.record(step)
        with self._finder.loading(folder, manifest) as loader:
            loader.load(self._take_apart(state, manifest, policy or LoadPolicy()), policy or LoadPolicy())
        return self._finder.info(folder, manifest)

    def _take_apart(self, state: MutableMapping[str, Any], manifest: Manifest, policy: LoadPolicy) -> list[Part]:
        def take_apart() -> list[Part]:
            parts = self._reader.take_apart(state, for_loading=True)
            if manifest.model_only and policy.missing == "error":
                check_asks_for_model_only(parts, manifest)
            return parts

        try:
            return self._talk.together(take_apart, "take the state apart", step=manifest.step)
        except GangError as error:
            failure = next((f for f in error.failures.values() if f.kind == ModelOnlyError.__name__), None)
            if failure is None:
                raise
            raise ModelOnlyError(failure.message, step=manifest.step) from error

    def steps(self) -> list[int]:
        """The committed steps, in order. Rank 0 looks, all are told the same."""
        return self.get_step_numbers()

    def latest(self) -> int | None:
        """The newest committed step, whether it is sound or not; None if there is none."""
        return max(self.steps(), default=None)
