"""The checkpointer: when a step is saved, what is loaded at the start, what the last save is."""

from __future__ import annotations

import os
from typing import Any, TypedDict

import torch

from shardckpt.errors import CheckpointNotFoundError, InvalidOperationError
from shardckpt.gang.gangs import Gangs
from shardckpt.integrations.titan.config import check
from shardckpt.integrations.titan.hub import export_with, load_from_hub
from shardckpt.integrations.titan.merging import whole_module, whole_optimizer
from shardckpt.manager.checkpoints import CheckpointManager
from shardckpt.run.choosing.due import Moment, SaveEvery
from shardckpt.run.retention import KeepAll, KeepLast
from shardckpt.streams import RngState

MODEL, OPTIMIZER, RNG = "model", "optimizer", "rng"


class Components(TypedDict, total=False):
    """What torchtitan's trainer makes its checkpointer of."""

    config: Any
    checkpoint_config: Any
    """The same, as 0.2 calls it: the names of `CheckpointConfig`."""
    model_parts: list[torch.nn.Module]
    optimizers: Any
    """An optimizer, or a container: what is iterated over, or has `optimizers`."""
    lr_schedulers: Any
    dataloader: Any
    """None, or any object with `state_dict` and `load_state_dict`."""
    states: dict[str, Any]
    """More of them, by key: {"train_state": ...}."""
    sd_adapter: Any
    """To and from the names of Hugging Face: `to_hf`, `from_hf`, `hf_assets_path`; None if there is none."""
    base_folder: str
    ft_manager: Any
    """Of torchft, which is not known here: None, or one that is not enabled."""


class Checkpointer:
    """Saves and loads for a trainer. Made by all ranks, and all methods called by all, in the same order, on the
    training's thread. See `CheckpointConfig` for what is configured.

    A failed save is raised by the next one (which of them: see `CheckpointManager`), or by `close`.
    """

    def __init__(self, **components: Any) -> None:
        """`components`: those of `Components`, of which torchtitan gives more than a call should have."""
        if unknown := sorted(components.keys() - Components.__annotations__.keys()):
            raise TypeError(f"a Checkpointer is not made of {', '.join(unknown)}, but of Components")
        given = Components(**components)  # type: ignore[typeddict-item]
        config = given.get("config") or given.get("checkpoint_config")
        if config is None:
            raise InvalidOperationError("a Checkpointer needs config=CheckpointConfig(...), or torchtitan's own")
        self.enable = bool(getattr(config, "enable", True))
        if not self.enable:
            return
        if getattr(given.get("ft_manager"), "enabled", False):
            raise InvalidOperationError("torchft's replicas are not known here: use torchtitan's own checkpointer")
        check(config)
        self._config, self._adapter = config, given.get("sd_adapter")
        if config.last_save_in_hf and self._adapter is None:
            raise ValueError("last_save_in_hf needs an adapter for the names of the model: sd_adapter is None")
        self.folder = _below(given.get("base_folder", ""), config.folder)
        self.states = given.get("states", {})
        self._state = _state_of(given)
        self._gangs = Gangs.from_env()
        keep = KeepLast(config.keep_latest_k) if config.keep_latest_k else KeepAll()
        self._checkpoints = CheckpointManager(self.folder, self._gangs, keep=keep)
        self._every = SaveEvery(steps=config.interval)

    def save(self, curr_step: int, last_step: bool = False) -> bool:
        """Save if it is due: every `interval` steps, at the last one, at the first if that is asked for. Whether it
        was."""
        if not self.enable or not self._is_due(curr_step, last=last_step):
            return False
        if last_step and self._config.last_save_model_only:
            self._save_model(curr_step)
            return True
        pending = self._checkpoints.save(curr_step, self._state)
        if last_step or getattr(self._config, "async_mode", "async").lower() == "disabled":
            pending.result()
        return True

    def load(self, step: int = -1) -> bool:
        """Resume from that step, or from the newest good one (-1); where there is none, begin as `initial_load_...`
        says. Whether anything was loaded. `CheckpointNotFoundError` if that step is not there."""
        if not self.enable:
            return False
        steps = self._checkpoints.steps()
        if step != -1 and step not in steps:
            raise CheckpointNotFoundError(f"there is no step {step} in {self.folder}, but {steps}", step=step)
        if not steps:
            return self._load_initially()
        if step == 0 or steps == [0]:  # a seed: the model before training
            self._checkpoints.load(0, self._model_alone())
        elif step != -1:
            self._checkpoints.load(step, self._wanted())
        else:
            self._checkpoints.resume(self._wanted())
        return True

    def maybe_wait_for_staging(self) -> None:
        """Before anything but a step of the optimizers changes parameters. They wait by themselves."""
        if self.enable:
            with self._checkpoints.guard():
                pass

    def maybe_wait_for_saving(self) -> None:
        """Until the save under way is committed; raises its failure."""
        if self.enable:
            self._checkpoints.wait()

    def close(self) -> None:
        """Let the save under way end; raises a failure that nobody has seen."""
        if getattr(self, "_gangs", None) is None:
            return
        gangs, self._gangs = self._gangs, None  # type: ignore[assignment]
        try:
            self._checkpoints.close()
        finally:
            gangs.close()

    def _is_due(self, step: int, *, last: bool) -> bool:
        if self._config.load_only:
            return False
        first = step == 1 and self._config.enable_first_step_checkpoint
        return last or first or bool(self._every.due(Moment(step), Moment(step - 1)))

    def _save_model(self, step: int) -> None:
        """The last save: when it returns, it is there."""
        dtype = getattr(torch, str(self._config.export_dtype).removeprefix("torch."))
        module = self._state[MODEL]
        with torch.no_grad():
            model = {name: _as_dtype(value, dtype) for name, value in module.state_dict().items()}
        self._checkpoints.save(step, {MODEL: model}).result()
        if self._config.last_save_in_hf:
            export_with(self._adapter, model, step=step, folder=self.folder, gangs=self._gangs)

    def _load_initially(self) -> bool:
        config = self._config
        if config.initial_load_in_hf:
            path = config.initial_load_path or getattr(self._adapter, "hf_assets_path", None)
            load_from_hub(self._adapter, self._state[MODEL], path, quantized=config.initial_load_in_hf_quantized)
            return True
        if config.initial_load_path is None:
            return False
        state = self._model_alone() if config.initial_load_model_only else self._wanted()
        self._checkpoints.resume(state, config.initial_load_path)
        return True

    def _model_alone(self) -> dict[str, Any]:
        return {MODEL: self._state[MODEL]}

    def _wanted(self) -> dict[str, Any]:
        excluded = set(self._config.exclude_from_loading)
        if unknown := sorted(excluded - self._state.keys()):
            has = ", ".join(self._state)
            raise ValueError(f"exclude_from_loading names {', '.join(unknown)}, but the state has {has}")
        return {key: part for key, part in self._state.items() if key not in excluded}


def _state_of(given: Components) -> dict[str, Any]:
    container = given.get("optimizers")
    optimizers = list(getattr(container, "optimizers", None) or [container])
    named = {
        "lr_scheduler": given.get("lr_schedulers"),
        "dataloader": given.get("dataloader"),
        **given.get("states", {}),
    }
    return {
        MODEL: whole_module(given["model_parts"]),
        **({} if container is None else {OPTIMIZER: whole_optimizer(optimizers)}),
        **{key: part for key, part in named.items() if part is not None},
        RNG: RngState(),
    }


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _below(base: str, folder: str) -> str:
    if "://" in folder:
        return folder
    return f"{base.rstrip('/')}/{folder}" if "://" in base else os.path.join(base, folder)
