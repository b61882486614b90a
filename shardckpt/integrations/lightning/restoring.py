"""What becomes of `ckpt_path`: the steps of ours go into the live objects, all else to Lightning as before.

Lightning asks its strategy for a checkpoint, a dict, and gives model, optimizers, loops and callbacks what is in it.
For `ModelParallelStrategy` it does so when model and optimizers are there; for the others before the strategy has set
them up, so that their optimizers are loaded when Lightning comes to them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.engine.pending import CheckpointInfo
from shardckpt.errors import CheckpointNotFoundError
from shardckpt.integrations.lightning.loaders import draw_as_iterators_do, restore_loaders
from shardckpt.integrations.lightning.places import is_ours, run_or_step, step_at
from shardckpt.integrations.lightning.state import (
    DATA,
    MODEL,
    OPTIMIZER,
    RNG,
    TRAINER,
    Held,
    Streams,
    answering,
    optimizers_of,
)
from shardckpt.manager.checkpoints import CheckpointManager
from shardckpt.manager.finding import ModelOnlyError

_log = logging.getLogger(__name__)


class Restoring:
    """One per run of a trainer. Called by all ranks, on the training's thread."""

    def __init__(self, trainer: Any, checkpoints: CheckpointManager, *, root: str, last: str, options: Any) -> None:
        self._trainer, self._checkpoints = trainer, checkpoints
        self._root, self._last, self._options = root, last, options
        self._streams = Streams()
        self._mid_epoch = False
        self._loaders: Sequence[Any] = ()
        """Their states. 2026-11: Lightning would give them to loaders before their samplers know the epoch, and at the
        end of one not at all, or so that an empty one follows."""
        self.info: CheckpointInfo | None = None
        """The step that was loaded, if one was."""
        self.is_own = False
        """It is of this run."""

    def instead_of(self) -> AbstractContextManager[None]:
        """As long as this is entered, the strategy asks here."""
        strategy = self._trainer.strategy
        self._theirs = strategy.load_checkpoint
        self._optimizers_theirs = strategy.load_optimizer_state_dict
        return answering(strategy, {"load_checkpoint": self._load, "load_optimizer_state_dict": self._load_optimizers})

    def training_starts(self) -> None:
        """The last moment at which what Lightning has drawn from the random streams by now can be undone."""
        if self.info is None:
            return
        loop = self._trainer.fit_loop
        if self._loaders:
            restore_loaders(
                loop._combined_loader.flattened,
                self._loaders,
                epoch=loop.epoch_progress.current.processed,
                begun=self._mid_epoch,
            )
            iter(loop._data_fetcher)
        self._streams.set_again()
        if not self._mid_epoch:
            draw_as_iterators_do(loop._combined_loader.flattened)

    def _load(self, place: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        own = step_at(self._root, place)
        self.is_own = own is not None or run_or_step(place) == self._root.rstrip("/")
        if not self.is_own and not is_ours(place, self._options):
            return dict(self._theirs(place, *args, **kwargs))
        if self.is_own and (own is None or str(place) == self._last):
            return self._restored(True)
        return self._restored(own if self.is_own and own is not None else run_or_step(place))

    def _restored(self, which: Any) -> dict[str, Any]:
        module = self._trainer.lightning_module
        rest = Held({}, new_world="first")
        state = {MODEL: module, TRAINER: rest}
        if self._is_fitting:
            data = Held({"loaders": []}, new_world="drop")
            state |= {DATA: data, RNG: self._streams}
            if self._trainer.strategy.restore_checkpoint_after_setup:
                state |= optimizers_of(self._trainer)
            self.info = self._resume(state, which)
            self._take_position(rest.values, data)
        else:
            self._resume_model(state, which)
        return (
            {"state_dict": module.state_dict(), "optimizer_states": [], **rest.values}
            if rest.is_loaded
            else {
                "state_dict": module.state_dict(),
                "pytorch-lightning_version": _version(),
            }
        )

    def _resume(self, state: dict[str, Any], which: Any) -> CheckpointInfo:
        info = self._checkpoints.resume(state, which, policy=self._policy())
        if info is None:
            raise CheckpointNotFoundError(f"there is no step to go on from in {self._root}")
        return info

    def _resume_model(self, state: dict[str, Any], which: Any) -> None:
        """For validation and tests, to which a step of the model alone will do."""
        which = self._checkpoints.latest() if which is True else which
        try:
            self.info = self._resume(state, which)
        except ModelOnlyError:
            self.info = self._resume({MODEL: state[MODEL]}, which)

    def _load_optimizers(self, checkpoint: Any) -> None:
        if self.info is None:
            self._optimizers_theirs(checkpoint)
            return
        state = {MODEL: self._trainer.lightning_module, **optimizers_of(self._trainer)}
        if OPTIMIZER in state:
            policy = LoadPolicy(include=[OPTIMIZER])
            if self.is_own:
                self._checkpoints.load(self.info.step, state, policy=policy)
            else:
                self._checkpoints.resume(state, self.info.url, policy=policy)
        self._streams.set_again()

    def _take_position(self, checkpoint: dict[str, Any], data: Held) -> None:
        """Whether training goes on in the middle of an epoch, and where the loaders were."""
        loop = checkpoint["loops"]["fit_loop"]
        progress = loop["epoch_progress"]["current"]
        self._mid_epoch = progress["processed"] < progress["started"]
        if data.is_loaded:
            self._loaders = data.values["loaders"]
        elif self._mid_epoch:
            _log.warning("the job has another number of ranks: loaders of data start their epoch again")

    @property
    def _is_fitting(self) -> bool:
        return str(self._trainer.state.fn.value) == "fit"

    def _policy(self) -> LoadPolicy:
        if self._trainer.lightning_module.strict_loading:
            return LoadPolicy()
        return LoadPolicy(missing="keep", unexpected="ignore")


def _version() -> str:
    from importlib.metadata import version

    return version("lightning")
