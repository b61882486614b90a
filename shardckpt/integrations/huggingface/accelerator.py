"""`accelerate.Accelerator` whose `save_state` and `load_state` are the engine's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Literal

from shardckpt.engine.pending import CheckpointInfo, PendingSave
from shardckpt.errors import CheckpointNotFoundError, InvalidOperationError
from shardckpt.integrations.frameworks import need
from shardckpt.integrations.options import CheckpointOptions, Root, inner, options_of
from shardckpt.manager.checkpoints import CheckpointManager
from shardckpt.manager.steps.resuming import Which
from shardckpt.run.retention import KeepLast
from shardckpt.streams import RngState

_NUMBER = re.compile(r"^(?P<above>.*?)(?:^|/)[^/]*?(?P<number>\d+)/?$", re.DOTALL)
"""A folder whose name ends in a number, as `checkpoint-500` or `step_500` does."""
_NOT_TORCHS = ("DEEPSPEED", "MEGATRON_LM", "XLA")
"""Kinds of `DistributedType` whose states are not torch's."""


class AcceleratorCheckpoints:
    """A mixin, to stand before `Accelerator`.

    `save_state` returns when what training may change next is safe, and gives a `PendingSave`. What is saved: prepared
    models, optimizers, schedulers, the scaler, random streams, places of prepared data loaders, and what
    `register_for_checkpointing` was given. A model that was sharded by `fully_shard` need not be prepared: any
    module may be given by `save_state_of`. Hooks of `register_save_state_pre_hook` are called; models of which they
    take the weights away are left to them.

    The step: `save_state(".../checkpoint-500")` is step 500 of the run at `...`, as people name their folders; with
    `automatic_checkpoint_naming` it is the number of the iteration, and with neither what `step=` says. Where the run
    lies is what `checkpoints` says, or else the folder above, which may be another one each time: a save that is under
    way in the one before is then waited for. `total_limit` keeps the last so many.

    `load_state()` loads the newest good step and `load_state(".../checkpoint-500")` step 500; both give its
    `CheckpointInfo`. `load_state("auto")` does as the first, but gives None if there is no step.

    One keyword is added, `checkpoints`: a root or `CheckpointOptions`. `end_training` waits for the last commit. All
    are called on all ranks.
    """

    project_configuration: Any
    project_dir: Any
    step: int
    _models: list[Any]
    _optimizers: list[Any]
    _schedulers: list[Any]
    _dataloaders: list[Any]
    _custom_objects: list[Any]
    _save_model_state_pre_hook: Mapping[Any, Any]
    _load_model_state_pre_hook: Mapping[Any, Any]
    scaler: Any

    checkpoints: CheckpointManager | None = None
    """From the first save or load on."""
    distributed_type: Any
    _root = ""
    _there: frozenset[int] = frozenset()
    """Steps that were there before this accelerator saved or loaded one."""
    _options = CheckpointOptions()
    _also: Mapping[str, Any] = {}

    def __init__(self, *args: Any, checkpoints: Root | CheckpointOptions | None = None, **kwargs: Any) -> None:
        self._options = options_of(checkpoints)
        base: Any = super()
        base.__init__(*args, **kwargs)

    def prepare_data_loader(self, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Accelerator.prepare_data_loader`; a loader without a generator gets one, seeded as torch is.

        Each iterator draws a seed for its workers. Drawn from the stream of training, it would shift all that is random
        after a resume, for that makes an iterator where the training that was not interrupted made none.
        """
        import torch

        base: Any = super()
        prepared = base.prepare_data_loader(data_loader, *args, **kwargs)
        inside = getattr(prepared, "base_dataloader", None)
        if inside is not None and getattr(inside, "generator", self) is None:
            inside.generator = torch.Generator().manual_seed(torch.initial_seed())
        return prepared

    def save_state_of(self, **parts: Any) -> None:
        """Modules, optimizers or other parts that are saved and loaded with the rest, by name, though not prepared."""
        self._also = {**self._also, **parts}

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        step: int | None = None,
        frozen: tuple[str, ...] = (),
    ) -> PendingSave:
        """As `Accelerator.save_state`, in the background. `frozen` as of `CheckpointManager.save`."""
        place = None if output_dir is None else os.fspath(output_dir)
        number = self._number(place, step)
        manager = self._manager(place)
        if self._is_naming and step is None and number in self._there:
            raise ValueError(
                f"step {number} is in {manager.storage.url} already: set project_configuration.iteration to what to "
                "start with, or load_state() first"
            )
        if self._save_model_state_pre_hook:
            place = place or f"{manager.storage.url}/checkpoint_{number}"
            if "://" not in place:  # hooks put into it what is theirs
                os.makedirs(place, exist_ok=True)
        models = self._left_by(self._save_model_state_pre_hook, place)
        frozen = frozen or (("*",) if any(map(_has_frozen, models)) else ())
        pending = manager.save(number, self._parts(models), frozen=frozen)
        self.project_configuration.iteration = number + 1
        return pending

    def load_state(
        self, input_dir: str | os.PathLike[str] | None = None, load_kwargs: Any = None, *, which: Which = True
    ) -> CheckpointInfo | None:
        """As `Accelerator.load_state`; `which` as of `CheckpointManager.resume`. `CheckpointNotFoundError` if there is
        no step, unless "auto" was asked for."""
        may_be_fresh = input_dir == "auto"
        place = None if input_dir is None or may_be_fresh else os.fspath(input_dir)
        named = _NUMBER.match(place or "")
        manager = self._manager(place)
        if place is None and self._load_model_state_pre_hook and (newest := manager.latest()) is not None:
            place = f"{manager.storage.url}/checkpoint_{newest}"
        parts = self._parts(self._left_by(self._load_model_state_pre_hook, place))
        if named is not None:
            info: CheckpointInfo | None = manager.load(int(named["number"]), parts)
        else:
            info = manager.resume(parts, which)
        if info is not None:
            self.step = parts["accelerator"].step
            self.project_configuration.iteration = info.step + 1
            self._there -= {step for step, _ in info.skipped}
        elif not may_be_fresh:
            raise CheckpointNotFoundError(f"there is no step in {manager.storage.url} to load")
        return info

    def end_training(self) -> None:
        """As `Accelerator.end_training`, when all is committed; raises the failure of the last save."""
        manager, self.checkpoints = self.checkpoints, None
        if manager is not None:
            manager.close()
        base: Any = super()
        base.end_training()

    @property
    def _is_naming(self) -> bool:
        return bool(self.project_configuration.automatic_checkpoint_naming)

    def _number(self, place: str | None, step: int | None) -> int:
        named = _NUMBER.match(place or "")
        if step is not None:
            return step
        if named is not None:
            return int(named["number"])
        return int(self.project_configuration.iteration)

    def _manager(self, place: str | None) -> CheckpointManager:
        kind = str(getattr(self.distributed_type, "value", self.distributed_type))
        if kind in _NOT_TORCHS:
            raise InvalidOperationError(f"{kind} keeps its state itself: use accelerate.Accelerator with it")
        if self.checkpoints is not None and (self._options.root is not None or place is None):
            return self.checkpoints
        root = self._root_of(place)
        if self.checkpoints is not None and root != self._root:
            manager, self.checkpoints = self.checkpoints, None
            manager.close()
        if self.checkpoints is None:
            self.checkpoints, self._root = self._options.open(root=root, keep=self._keep()), root
            self._there = frozenset(self.checkpoints.steps()) if self._is_naming else frozenset()
        return self.checkpoints

    def _root_of(self, place: str | None) -> str:
        if place is not None:
            named = _NUMBER.match(place)
            return (named["above"] or ".") if named is not None else place
        if self.project_dir is None and self._options.root is None:
            raise ValueError("where to? give a folder, or Accelerator(checkpoints=...), or a project_dir")
        return os.path.join(self.project_dir or "", "checkpoints")

    def _keep(self) -> KeepLast | None:
        limit = self.project_configuration.total_limit
        return KeepLast(limit) if limit else None

    def _left_by(self, hooks: Mapping[Any, Any], place: str | None) -> list[Any]:
        """The models that the hooks of others leave to us."""
        models = list(self._models)
        if hooks is self._save_model_state_pre_hook and hooks:
            weights = [model.state_dict() for model in models]
            owners = {id(state): model for state, model in zip(weights, models, strict=True)}
            for hook in hooks.values():
                hook(models, weights, place)
            return [owners[id(state)] for state in weights]
        for hook in hooks.values():
            hook(models, place)
        return models

    def _parts(self, models: list[Any]) -> dict[str, Any]:
        parts: dict[str, Any] = {"accelerator": _Counters(self)}
        for name, owners in (
            ("model", [model if any(model is left for left in models) else None for model in self._models]),
            ("optimizer", [inner(optimizer) for optimizer in self._optimizers]),
            ("scheduler", self._schedulers),
            ("data", [_LoaderPlace(loader) for loader in self._dataloaders]),
            ("custom", self._custom_objects),
        ):
            names = [name if number == 0 else f"{name}_{number}" for number in range(len(owners))]
            parts |= {own: owner for own, owner in zip(names, owners, strict=True) if owner is not None}
        if self.scaler is not None:
            parts["scaler"] = self.scaler
        return {**parts, **self._also, "rng": RngState()}


class _Counters:
    """What an accelerator counts itself."""

    new_world: Literal["first"] = "first"

    def __init__(self, accelerator: Any) -> None:
        self.step = int(accelerator.step)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.step = int(state_dict["step"])


class _LoaderPlace:
    """Where a prepared data loader is: of torchdata's its own state, of others the epoch, from which their order
    follows; then `skip_first_batches` goes on within it, as without us."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._is_stateful = bool(getattr(loader, "use_stateful_dataloader", False))

    def state_dict(self) -> dict[str, Any]:
        if self._is_stateful:
            return {"loader": self._loader.state_dict()}
        sampler = self._sampler()
        own = {} if sampler is None else {"epoch": sampler.epoch, "seed": sampler.initial_seed}
        return {"iteration": getattr(self._loader, "iteration", 0), **own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if "loader" in state_dict:
            self._loader.load_state_dict(state_dict["loader"])
            return
        if hasattr(self._loader, "iteration"):
            self._loader.iteration = int(state_dict["iteration"])
        sampler = self._sampler()
        if sampler is not None and "epoch" in state_dict:
            sampler.epoch, sampler.initial_seed = int(state_dict["epoch"]), int(state_dict["seed"])

    def _sampler(self) -> Any:
        kind = need("accelerate.data_loader", extra="accelerate").SeedableRandomSampler
        sampler = self._loader.get_sampler() if hasattr(self._loader, "get_sampler") else None
        return sampler if isinstance(sampler, kind) else None


def _has_frozen(model: Any) -> bool:
    return any(not parameter.requires_grad for parameter in model.parameters())
