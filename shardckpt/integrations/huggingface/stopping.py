"""A training with Trainer that is told to stop: one last save, on all ranks after the same step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardckpt.integrations.frameworks import need

if TYPE_CHECKING:
    from shardckpt.integrations.huggingface.trainer import TrainerCheckpoints


def stopper(trainer: TrainerCheckpoints) -> Any:
    """A `TrainerCallback` that asks the manager after each step. Until `stop_on` was called it says no, at once."""

    class Stopper(need("transformers", extra="hf").TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            manager = trainer.checkpoints
            if manager is not None and manager.should_stop(state.global_step):
                control.should_save = control.should_training_stop = trainer._is_told_to_stop = True

    return Stopper()
