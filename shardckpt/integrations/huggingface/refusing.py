"""What a training with `Trainer` cannot have here, said before it begins."""

from __future__ import annotations

import logging
from typing import Any

from shardckpt.errors import InvalidOperationError
from shardckpt.integrations.frameworks import need

_log = logging.getLogger(__name__)


def check(trainer: Any) -> None:
    """`InvalidOperationError` for what would not work; a warning for what will be left out."""
    for kind in ("deepspeed", "fsdp_xla"):
        if getattr(trainer, f"is_{kind}_enabled", False):
            raise InvalidOperationError(f"{kind} keeps its state itself: use transformers.Trainer with it")
    transformers = need("transformers", extra="hf")
    for name in ("_finalize_training", "_init_training_state"):
        if not hasattr(transformers.Trainer, name):
            raise InvalidOperationError(
                f"transformers {transformers.__version__} is too old: its Trainer has no {name}, which came with 5.3"
            )
    strategy = getattr(trainer.args.hub_strategy, "value", trainer.args.hub_strategy)
    if trainer.args.push_to_hub and strategy != "end" and trainer.args.process_index == 0:
        text = "hub_strategy=%r: checkpoints are not pushed; push_to_hub() after train() pushes the model"
        _log.warning(text, strategy)
