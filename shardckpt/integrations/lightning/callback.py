"""The callback: when to save, what is best, and the life of a manager within a run of a trainer.

Mixed into Lightning's `ModelCheckpoint`, whose attributes it goes by; Lightning itself is not imported here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from shardckpt.engine.background.manners import Manners
from shardckpt.engine.background.policy import SavePolicy
from shardckpt.errors import CheckpointError, InvalidOperationError
from shardckpt.gang.gangs import Gangs
from shardckpt.integrations.lightning.missing import say_missing
from shardckpt.integrations.lightning.places import best_in, place_of, step_at, steps_in
from shardckpt.integrations.lightning.restoring import Restoring
from shardckpt.integrations.lightning.state import state_to_save
from shardckpt.manager.checkpoints import CheckpointManager
from shardckpt.manager.steps.resuming import Overwrite
from shardckpt.manager.steps.scheduling import Schedule
from shardckpt.run.choosing.due import Moment, SaveEvery, SaveRule
from shardckpt.run.retention import SCORE, KeepAll, KeepBest, KeepLast, Policy

_log = logging.getLogger(__name__)

_LAST_TRY = timedelta(minutes=1)
"""How long the save of a training that has failed may take: the other ranks may not come to it."""
_NOT_FOR = {"FSDPStrategy": "ModelParallelStrategy, with fully_shard", "DeepSpeedStrategy": "ModelParallelStrategy"}


@dataclass(frozen=True, slots=True)
class Terms:
    """What is said beside the `ModelCheckpoint`; see `checkpoints`."""

    frozen: Collection[str] = ()
    overwrite: Overwrite = "error"
    saving: SavePolicy | None = None
    manners: Manners | None = None
    timeout: timedelta = timedelta(minutes=30)
    tolerate: int = 2
    storage_options: Mapping[str, object] | None = None


class TheCallback:
    """Hooks of a Lightning callback. Called by all ranks, on the training's thread."""

    dirpath: Any
    monitor: str | None
    mode: str
    save_top_k: int
    save_last: Any
    save_weights_only: bool
    best_k_models: dict[str, Any]
    best_model_score: Any
    last_model_path: str
    _every_n_train_steps: int
    _every_n_epochs: int
    _train_time_interval: timedelta | None
    _last_global_step_saved: int
    _last_checkpoint_saved: str
    _should_skip_saving_checkpoint: Any
    _should_save_on_train_epoch_end: Any
    _should_save_on_exception: Any

    def prepare(self, terms: Terms) -> None:
        """Where there is no `__init__`: the attributes are those of a `ModelCheckpoint` that was made before."""
        self._terms = terms
        self._checkpoints: CheckpointManager | None = None
        self._restoring: Restoring | None = None
        self._schedule: Schedule | None = None
        self._running = ExitStack()
        self._last_asked = ""
        self._best = str(vars(self).pop("best_model_path", vars(self).get("_best", "")))
        self._seen_step = 0
        self._is_owed = False

    def __reduce__(self) -> Any:
        from shardckpt.integrations.lightning.making import again

        mine = {"_terms", "_checkpoints", "_restoring", "_schedule", "_running"}
        return again, ({name: value for name, value in vars(self).items() if name not in mine}, self._terms)

    # --- a run of the trainer ---

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        strategy = trainer.strategy
        for kind in type(strategy).__mro__:
            if kind.__name__ in _NOT_FOR:
                raise InvalidOperationError(
                    f"checkpoints() does not know {kind.__name__}: use {_NOT_FOR[kind.__name__]}"
                )
        if self.dirpath is None:
            super().setup(trainer, pl_module, stage)  # type: ignore[misc]
        last = self._last_asked
        self._close(quietly=True)
        mesh = getattr(strategy, "_device_mesh", None)
        gangs = Gangs.from_env(tp=1 if mesh is None else mesh["tensor_parallel"].size())
        self._running.callback(gangs.close)
        terms = self._terms
        self._checkpoints = CheckpointManager(
            self._root,
            gangs,
            keep=self._policy(),
            timeout=terms.timeout,
            saving=terms.saving,
            manners=terms.manners,
            tolerate=terms.tolerate,
            storage_options=terms.storage_options,
        )
        self._restoring = Restoring(
            trainer, self._checkpoints, root=self._root, last=last, options=terms.storage_options
        )
        self._running.enter_context(self._restoring.instead_of())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert self._checkpoints is not None
        assert self._restoring is not None
        self._restoring.training_starts()
        step, resumed = trainer.global_step, self._restoring.info is not None and self._restoring.is_own
        if not resumed and not trainer.fast_dev_run and (self._checkpoints.latest() or 0) > step:
            self._checkpoints.resume({}, False, overwrite=self._terms.overwrite)
        rule = self._rule()
        self._schedule = None if rule is None else self._checkpoints.schedule(rule, step=step)
        self._seen_step, self._is_owed = step, False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self._schedule is None or step == self._seen_step or self._is_passed_over(trainer):
            return  # in between gradients are being gathered
        self._seen_step = step
        self._is_owed |= self._schedule.due(step)
        if self._is_owed and not trainer.is_last_batch:
            self._save(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._is_passed_over(trainer):
            return
        if not self._should_save_on_train_epoch_end(trainer):
            self._is_owed |= self._is_due_by_epoch(trainer)
        if self._is_owed and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._is_passed_over(trainer):
            return
        if self._should_save_on_train_epoch_end(trainer):
            self._is_owed |= self._is_due_by_epoch(trainer)
        if self._is_owed:
            self._save(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self._checkpoints is not None
        if self.save_last and not self._last_checkpoint_saved:  # it was shorter than the interval
            self._is_owed |= self._checkpoints.latest() != trainer.global_step
        if self._is_owed and not self._is_passed_over(trainer):
            self._save(trainer)
        self._checkpoints.wait()
        self._look_again()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        asked = getattr(self, "save_on_exception", False)  # Lightning 2.5.0 has no such option
        if asked and self._checkpoints is not None and self._should_save_on_exception(trainer):
            self._save(trainer, deadline=_LAST_TRY)
        self._close(quietly=True)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._close(quietly=False)

    def _close(self, *, quietly: bool) -> None:
        checkpoints, self._checkpoints, self._restoring, self._schedule = self._checkpoints, None, None, None
        self._last_asked = ""
        with self._running.pop_all():
            try:
                if checkpoints is not None:
                    checkpoints.close()
            except CheckpointError as failure:
                if not quietly:
                    raise
                _log.error("besides, %s", failure)

    # --- when ---

    def _rule(self) -> SaveRule | None:
        interval = self._train_time_interval
        if interval is not None and interval > timedelta(0):
            return SaveEvery(seconds=interval.total_seconds())
        steps = self._every_n_train_steps if interval is None else 1
        return SaveEvery(steps=steps) if steps else None

    def _is_due_by_epoch(self, trainer: Any) -> bool:
        if self._every_n_epochs < 1:
            return False
        epoch, rule = trainer.current_epoch, SaveEvery(epochs=self._every_n_epochs)
        return bool(rule.due(Moment(0, epoch + 1), Moment(0, epoch)))

    def _is_passed_over(self, trainer: Any) -> bool:
        """Nothing is to be saved, or it has been."""
        return bool(self._should_skip_saving_checkpoint(trainer)) or (self.save_top_k == 0 and not self.save_last)

    # --- what is kept ---

    def _policy(self) -> Policy:
        if self.save_top_k < 1:
            return KeepAll() if self.save_top_k else KeepLast(1)
        if self.monitor is None:
            return KeepLast(self.save_top_k)
        return KeepBest(self.save_top_k, metric=self.monitor, lower_better=self.mode == "min")

    def _save(self, trainer: Any, *, deadline: timedelta | None = None) -> None:
        assert self._checkpoints is not None
        self._is_owed, step = False, trainer.global_step
        metrics = self._measured(trainer, together=deadline is None)
        self._note(step, metrics)  # before, for it is part of what is saved
        state = state_to_save(trainer, weights_only=self.save_weights_only)
        self._checkpoints.save(step, state, frozen=self._terms.frozen, deadline=deadline)
        self._last_global_step_saved = step
        if deadline is not None:
            return
        score = metrics.pop(SCORE, None)
        if score is not None:
            self._checkpoints.save_score(score, step=step)
        if metrics:
            self._checkpoints.save_metrics(metrics, step=step)
        if self.monitor is not None and self.monitor not in trainer.callback_metrics:
            say_missing(trainer, self.monitor)

    def _measured(self, trainer: Any, *, together: bool) -> dict[str, float]:
        """What was logged, as far as it can be compared. Rank 0's counts for all, unless they may not come: ranks log
        values of their own, and what is best, and what is to be agreed on, must not differ."""
        assert self._checkpoints is not None
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        logged = {name: value for name, value in logged.items() if value == value}
        return dict(self._checkpoints._do("logged", lambda: logged)) if together else logged

    def _note(self, step: int, metrics: Mapping[str, float]) -> None:
        place = self._last_checkpoint_saved = self.last_model_path = place_of(self._root, step)
        if self.monitor is None:
            self.best_model_path = place
        elif self.monitor in metrics:
            self.best_k_models[place] = torch.tensor(metrics[self.monitor])
            self._rank()

    def _rank(self) -> None:
        """`best_k_models` and the like, of the saves that this rank knows of."""
        policy, known = self._policy(), {}
        for place, value in self.best_k_models.items():
            step = step_at(self._root, place)
            if step is not None:
                known[step] = float(value)
        rule = policy if isinstance(policy, KeepBest) else KeepBest(max(1, len(known)), lower_better=self.mode == "min")
        best = [place_of(self._root, step) for step in rule.ranking(known)[: rule.n]]
        self.best_k_models = {place: self.best_k_models[place] for place in best}
        self.best_model_path = best[0] if best else ""
        self.best_model_score = self.best_k_models[best[0]] if best else None

    def _look_again(self) -> None:
        """What there is, now that all saves are over: paths of steps that failed are forgotten."""
        assert self._checkpoints is not None
        steps = self._checkpoints.steps()
        self.last_model_path = place_of(self._root, steps[-1]) if steps else ""
        there = {place_of(self._root, step) for step in steps}
        self.best_k_models = {place: value for place, value in self.best_k_models.items() if place in there}
        if self.monitor is not None:
            self._rank()
        else:
            self.best_model_path = self.last_model_path

    # --- where ---

    @property
    def _root(self) -> str:
        return str(self.dirpath)

    @property
    def best_model_path(self) -> str:
        """The best step; before a run of the trainer the best of those in `dirpath`."""
        if not self._best and self._checkpoints is None and self.dirpath is not None and self.monitor is not None:
            step = best_in(self._root, self._policy(), self._terms.storage_options)
            return "" if step is None else place_of(self._root, step)
        return self._best

    @best_model_path.setter
    def best_model_path(self, place: str) -> None:
        self._best = place

    def _find_last_checkpoints(self, trainer: Any) -> set[str]:
        """What `ckpt_path="last"` means, asked by each rank by itself, before there is a manager."""
        if self.dirpath is None:
            return set()
        steps = steps_in(self._root, self._terms.storage_options)
        self._last_asked = place_of(self._root, steps[-1]) if steps else ""
        return {self._last_asked} if steps else set()
