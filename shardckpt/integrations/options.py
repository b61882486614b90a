"""How the checkpoints of a framework's trainer are kept, as one value: what its own options do not say."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeAlias

from shardckpt.engine.background.manners import Manners
from shardckpt.engine.background.policy import SavePolicy
from shardckpt.gang.gangs import Gangs
from shardckpt.manager.checkpoints import CheckpointManager
from shardckpt.run.registry.one import Run
from shardckpt.run.retention import Policy
from shardckpt.storage.base import Storage

Root: TypeAlias = str | os.PathLike[str] | Storage | Run


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """Given to a trainer or accelerator as `checkpoints=`, where the root alone would do. See `CheckpointManager`."""

    root: Root | None = None
    """Where the run lies; if not given, where the framework would put its checkpoints."""
    keep: Policy | None = None
    """If not given, what the framework's options say (`save_total_limit`, `total_limit`)."""
    saving: SavePolicy | None = None
    manners: Manners | None = None
    timeout: timedelta = timedelta(minutes=30)
    storage_options: Mapping[str, object] | None = None
    on_open: Callable[[CheckpointManager], object] | None = None
    """Called with each manager that is made, by all ranks, before it is used: to subscribe, or `stop_on` signals."""
    gangs: Callable[[], Gangs] = Gangs.from_env
    """Called when a manager is made, by all ranks."""
    export: bool = True
    """For `Trainer`: each step's model also as `<output_dir>/checkpoint-<step>`, which `from_pretrained` opens."""

    def open(self, *, root: Root, keep: Policy | None) -> CheckpointManager:
        """A manager. Called by all ranks; `root` and `keep` are the framework's own, for what is not given."""
        manager = CheckpointManager(
            self.root if self.root is not None else root,
            self.gangs(),
            keep=self.keep or keep,
            timeout=self.timeout,
            saving=self.saving,
            manners=self.manners,
            storage_options=self.storage_options,
        )
        if self.on_open is not None:
            self.on_open(manager)
        return manager

    def below(self, name: str) -> CheckpointOptions:
        """The same, for a run in a folder of the root."""
        if self.root is None:
            return self
        if not isinstance(self.root, (str, os.PathLike)):
            raise ValueError(f"several runs need a root that is a path or a URL, not {type(self.root).__name__}")
        return replace(self, root=f"{os.fspath(self.root).rstrip('/')}/{name}")


def options_of(given: Root | CheckpointOptions | None) -> CheckpointOptions:
    """What was given as `checkpoints=`."""
    return given if isinstance(given, CheckpointOptions) else CheckpointOptions(root=given)


def inner(optimizer: Any) -> Any:
    """The optimizer of torch in a framework's wrapper, whose `step` is hooked and whose parameters have names."""
    import torch

    wrapped = getattr(optimizer, "optimizer", None)
    return wrapped if isinstance(wrapped, torch.optim.Optimizer) else optimizer
