"""Hugging Face: `Trainer`, `Accelerator` and PEFT over the engine. A framework is imported when its name is first used.

    from shardckpt.integrations.huggingface import Trainer          # instead of: from transformers import Trainer
    from shardckpt.integrations.huggingface import Accelerator      # instead of: from accelerate import Accelerator

A trainer of another class, or one of your own, takes the mixin first: `class Mine(TrainerCheckpoints, SFTTrainer)`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shardckpt.integrations.frameworks import need

if TYPE_CHECKING:
    from shardckpt.integrations.huggingface.accelerator import AcceleratorCheckpoints as AcceleratorCheckpoints
    from shardckpt.integrations.huggingface.adapters import adapter_only as adapter_only
    from shardckpt.integrations.huggingface.pretrained import from_pretrained as from_pretrained
    from shardckpt.integrations.huggingface.trainer import TrainerCheckpoints as TrainerCheckpoints
    from shardckpt.integrations.options import CheckpointOptions as CheckpointOptions

    Trainer: Any
    Accelerator: Any

_HERE = {
    "AcceleratorCheckpoints": "huggingface.accelerator",
    "CheckpointOptions": "options",
    "TrainerCheckpoints": "huggingface.trainer",
    "adapter_only": "huggingface.adapters",
    "from_pretrained": "huggingface.pretrained",
}
_MADE = {
    "Accelerator": ("AcceleratorCheckpoints", "accelerate", "accelerate"),
    "Trainer": ("TrainerCheckpoints", "transformers", "hf"),
}
"""Class -> the mixin over the framework's class of that name, its module, and the extra."""

__all__ = [*_HERE, *_MADE]


def __getattr__(name: str) -> Any:
    if name in _HERE:
        value: Any = getattr(import_module(f"shardckpt.integrations.{_HERE[name]}"), name)
    elif name in _MADE:
        mixin, module, extra = _MADE[name]
        framework = need(module, extra=extra)
        value = type(name, (__getattr__(mixin), getattr(framework, name)), {"__module__": __name__})
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
