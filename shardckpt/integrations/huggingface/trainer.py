"""`transformers.Trainer` whose checkpoints are the engine's: its options keep their meaning, its loop is as it was."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from shardckpt.engine.pending import CheckpointInfo
from shardckpt.errors import CheckpointDamagedError, InvalidOperationError
from shardckpt.integrations.frameworks import need
from shardckpt.integrations.huggingface.parts import LateRngState, TrainerProgress, numbers_of
from shardckpt.integrations.huggingface.places import PREFIX, is_trainers_own, newest_of_trainers_own, which_of
from shardckpt.integrations.huggingface.pretrained import Exporter, put_beside
from shardckpt.integrations.huggingface.refusing import check
from shardckpt.integrations.huggingface.stopping import stopper
from shardckpt.integrations.huggingface.total import KeepTotal
from shardckpt.integrations.options import CheckpointOptions, Root, inner, options_of
from shardckpt.manager.checkpoints import CheckpointManager
from shardckpt.manager.steps.resuming import Which

_log = logging.getLogger(__name__)


class TrainerCheckpoints:
    """A mixin, to stand before `Trainer` or a class below it: `class Mine(TrainerCheckpoints, SFTTrainer): ...`.

    Steps are saved by a `CheckpointManager` in the background, when Trainer's options say so (`save_strategy`,
    `save_steps`, `save_only_model`), and kept as `save_total_limit` says, with the best one. `load_best_model_at_end`
    loads it. `train(resume_from_checkpoint=...)` takes True (the newest good step; damaged ones are passed over),
    "auto" (the same, or a fresh start if there is none), the place of a step or run of ours ("s3://lab/run/step_500",
    "out/checkpoint-500"), or a folder that Trainer itself has written. When `train` returns, all is committed. With
    `CheckpointOptions(on_open=lambda checkpoints: checkpoints.stop_on())` a SIGTERM to any rank ends it after a save.

    One keyword is added, `checkpoints`: a root (`output_dir` if not given) or `CheckpointOptions`. Called on all ranks.
    """

    args: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    state: Any
    control: Any
    callback_handler: Any
    processing_class: Any
    hp_search_backend: Any
    store_flos: Any

    checkpoints: CheckpointManager | None = None
    """While `train` runs: to `pin` a step, or to `guard()` changes of parameters that the optimizer does not make."""
    resumed: CheckpointInfo | None = None
    """The step from which the last call of `train` has gone on."""
    _options = CheckpointOptions()
    _keep: KeepTotal
    _exporter: Exporter | None = None
    _late_rng: LateRngState
    _has_loaded = False
    _is_told_to_stop = False
    _here = ""
    """Where Trainer would put its folders: `output_dir`, or that of a trial."""
    _saved: set[int]
    _measured: tuple[int, dict[str, float]] = (-1, {})

    def __init__(self, *args: Any, checkpoints: Root | CheckpointOptions | None = None, **kwargs: Any) -> None:
        self._options = options_of(checkpoints)
        base: Any = super()
        base.__init__(*args, **kwargs)
        base.add_callback(stopper(self))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As `Trainer.train`."""
        base: Any = super()
        with self._opened(trial) as manager, TemporaryDirectory(prefix="shardckpt-trainer-") as name:
            found = self._find(manager, resume_from_checkpoint, Path(name))
            while isinstance(found, CheckpointInfo):
                self._begin(found)
                try:
                    return base.train(name, trial, ignore_keys_for_eval)
                except CheckpointDamagedError as error:
                    older = [step for step in manager.steps() if step < found.step]
                    if self._has_loaded or resume_from_checkpoint not in (True, "auto") or not older:
                        raise
                    _log.warning("step %d is passed over: %s", found.step, error)
                    found = self._look_into(manager, older[-1], Path(name))
            self._begin(None)
            return base.train(found, trial, ignore_keys_for_eval)

    def _begin(self, found: CheckpointInfo | None) -> None:
        """Training goes on from that step. Steps that it does not lead to are of another one, and go first."""
        self.resumed, self._has_loaded = found, False
        first = found.step if found is not None and self._is_here(found) else -1
        self._keep.stale = {step for step in self._saved if step > first}
        self._saved -= self._keep.stale
        if self._keep.stale:
            text = "%s has steps up to %d, to which this training does not lead: to resume may go on from these"
            _log.warning(text, self._open_manager().storage.url, max(self._keep.stale))

    def _is_here(self, found: CheckpointInfo) -> bool:
        return found.url.startswith(f"{self._open_manager().storage.url.rstrip('/')}/")

    @contextmanager
    def _opened(self, trial: Any) -> Iterator[CheckpointManager]:
        """The manager of one call of `train`."""
        base: Any = super()
        check(self)
        self._here = here = str(base._get_output_dir(trial))
        options = self._options if here == self.args.output_dir else self._options.below(os.path.basename(here))
        self._keep, self._late_rng, self.resumed = KeepTotal(self.args.save_total_limit), LateRngState(), None
        self._is_told_to_stop = False
        with ExitStack() as stack:
            manager = options.open(root=here, keep=self._keep)
            is_first = self.args.process_index == 0
            if is_first and options.export:
                self._exporter = Exporter(manager, Path(here), model=self.model, prefix=PREFIX)
                stack.callback(self._exporter.close)
            stack.enter_context(manager)
            self.checkpoints, self._saved = manager, set(manager.steps())
            try:
                if is_first and self.args.save_strategy != "no":
                    put_beside(manager, self.model, self.processing_class)
                yield manager
                manager.wait()
            finally:
                if self._exporter is not None:
                    self._exporter.wait()
                self.checkpoints = self._exporter = None

    def _find(self, manager: CheckpointManager, asked: Any, folder: Path) -> CheckpointInfo | str | None:
        """The step to resume from, its TrainerState put into the folder; or a folder that Trainer itself has written,
        also where it is the newest, and there is no step of ours; None for a fresh start."""
        if asked is None or asked is False:
            return None
        is_newest = asked in (True, "auto")
        if not is_newest and is_trainers_own(asked):
            return str(os.fspath(asked))
        info = self._look_into(manager, True if is_newest else which_of(os.fspath(asked), here=self._here), folder)
        if info is not None:
            return info
        own = newest_of_trainers_own(manager, self._here)
        if own is None and asked != "auto":
            raise ValueError(f"No valid checkpoint found in output directory ({manager.storage.url})")
        return own

    def _look_into(self, manager: CheckpointManager, which: Which, folder: Path) -> CheckpointInfo | None:
        progress = TrainerProgress()
        info = manager.resume({"trainer": progress}, which)
        if info is not None:
            progress.put_into(folder)
        if self._exporter is not None:
            self._exporter.complete(self._saved)
        return info

    def _whole(self) -> MutableMapping[str, Any]:
        """The state of this training, as it is saved and loaded."""
        state: dict[str, Any] = {"model": self.model, "trainer": TrainerProgress(self.state)}
        if self.args.save_only_model:
            return state
        state |= {"optimizer": inner(self.optimizer), "scheduler": self.lr_scheduler, "rng": self._late_rng}
        scaler = getattr(self.accelerator, "scaler", None)
        return state if scaler is None else state | {"scaler": scaler}

    # What Trainer calls: saving.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        manager = self._open_manager()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        step = self.state.global_step
        self._note_best(step)
        self._note_callbacks()
        frozen = ("*",) if any(not parameter.requires_grad for parameter in self.model.parameters()) else ()
        pending = manager.save(step, self._whole(), frozen=frozen)
        self._saved.add(step)
        self._keep.stale.discard(step)
        if self._exporter is not None:
            self._exporter.follow(pending)
        measured, metrics = self._measured
        if measured == step and metrics:
            manager.save_metrics(metrics, step=step)

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
        self._measured = (self.state.global_step, numbers_of(metrics))
        base: Any = super()
        is_new_best = bool(base._determine_best_metric(metrics, trial))
        if is_new_best and self.args.save_strategy != "no":
            self.state.best_global_step = self.state.global_step  # transformers 5.3 leaves "best" out
        # `save_strategy="best"` goes by what is given back; the last save before the end is due in any case.
        return is_new_best or self._is_told_to_stop

    def _note_best(self, step: int) -> None:
        """As Trainer: the best step is one that has been saved."""
        best = self.state.best_global_step
        if self.args.save_strategy != "no" and best and (best == step or best in self._saved):
            self._best_is(best)

    def _best_is(self, step: int) -> None:
        if step not in self._keep.bests:
            self._keep.bests.append(step)
        root = self._open_manager().storage.url.rstrip("/")
        place = os.path.join(self._here, f"{PREFIX}{step}") if self._options.export else f"{root}/step_{step}"
        self.state.best_model_checkpoint = place

    def _note_callbacks(self) -> None:
        exportable = need("transformers.trainer_callback", extra="hf").ExportableState
        every = [*self.callback_handler.callbacks, self.control]
        told = type(self.state)(stateful_callbacks=[each for each in every if isinstance(each, exportable)])
        self.state.stateful_callbacks = told.stateful_callbacks

    # What Trainer calls: loading.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.resumed is None:
            base: Any = super()
            base._load_from_checkpoint(resume_from_checkpoint, model)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()
        counted = base._init_training_state(*args, **kwargs)
        best = self.state.best_global_step
        if self.resumed is not None and best and best in self._saved:
            self._best_is(best)
        return counted

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.resumed is None:
            base: Any = super()
            base._load_optimizer_and_scheduler(checkpoint)
            return
        manager = self._open_manager()
        if self._is_here(self.resumed):
            manager.load(self.resumed.step, self._whole())
        else:
            manager.resume(self._whole(), self.resumed.url)
        self._has_loaded = True

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.resumed is None:
            base: Any = super()
            base._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resumed is None:
            base: Any = super()
            base._load_rng_state(checkpoint)
        else:
            self._late_rng.apply()

    def _load_best_model(self) -> None:
        manager, best = self._open_manager(), self.state.best_global_step
        step = self._best_there(manager)
        if step != best:
            _log.warning("step %s, the best, is not there: its save failed, or it was deleted", best)
        if step is not None:
            _log.info("the best model is that of step %s (%s)", step, self.state.best_metric)
            manager.load(step, {"model": self.model})

    def _best_there(self, manager: CheckpointManager) -> int | None:
        """Of the committed steps the last one that was the best when it was saved."""
        steps = manager.steps()
        return next((step for step in reversed(self._keep.bests) if step in steps), None)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        manager = self._open_manager()
        manager.wait()
        if self._exporter is not None:
            self._exporter.wait()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # ours deletes what is ours
        try:
            base: Any = super()
            output = base._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        # Not where training is to go on: that is what the last step is for.
        if limit == 1 and self._keep.bests and self._options.keep is None and not self._is_told_to_stop:
            best = self._best_there(manager)
            for step in manager.steps() if best is not None else []:
                if step != best:
                    manager.delete_checkpoint(step)
        return output

    def _open_manager(self) -> CheckpointManager:
        if self.checkpoints is None:
            _not_training()
        return self.checkpoints


def _not_training() -> NoReturn:
    raise InvalidOperationError("a Trainer saves and loads checkpoints while train() runs; save_model() needs none")
