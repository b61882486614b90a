"""What becomes of a training with `Trainer` where something is not as it should be: a save that fails, a signal before
the end, steps of other trainings in the same place."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shardckpt.storage.open import open_storage
from shardckpt.testing.faults import FailingStorage, on
from tests.integrations.huggingface.jobs import arguments, rows, small_model
from tests.integrations.huggingface.options import BEST, evaluated, folders_in, life, steps_in


def the_best_is_not_saved(rank: int, world_size: int, shared: Path, folder: Path) -> dict[str, Any]:
    """Step 4 is the best, and the storage refuses it. Which are there at the end, and whose model the trainer has."""
    from transformers import GPT2LMHeadModel

    from shardckpt.integrations.huggingface import Trainer

    found: dict[str, Any] = {}
    for limit in (1, 2):
        place = folder / str(limit)
        root = FailingStorage(open_storage(place), on(key="step_4"), times=None)
        trainer = life(Trainer, place, {**BEST, "save_total_limit": limit}, checkpoints=root)
        kept = steps_in(place)
        states = {step: GPT2LMHeadModel.from_pretrained(place / f"checkpoint-{step}").state_dict() for step in kept}
        own = trainer.model.state_dict()
        models = [step for step, state in states.items() if all(torch.equal(own[name], state[name]) for name in own)]
        found[f"limit {limit}"] = (root.failed > 0, kept, models)
    return found


def told_to_stop(rank: int, world_size: int, shared: Path, folder: Path) -> dict[str, Any]:
    """Where only the best is to stay at the end, and training is told to stop: the steps that are there."""
    from transformers import TrainerCallback

    from shardckpt.integrations.huggingface import CheckpointOptions, Trainer

    class Terminate(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    found: dict[str, Any] = {}
    for name, strategy in (("steps", {}), ("best", {"save_strategy": "best"})):
        place = folder / name
        options = {**BEST, "save_total_limit": 1, **strategy}
        watched = CheckpointOptions(on_open=lambda checkpoints: checkpoints.stop_on())
        life(Trainer, place, options, callbacks=[Terminate()], checkpoints=watched)
        stopped = steps_in(place)
        again = life(Trainer, place, options, resume=True)
        found[name] = (stopped, again.resumed.step, steps_in(place))
    return found


def in_a_place_that_is_not_empty(rank: int, world_size: int, shared: Path, folder: Path) -> dict[str, Any]:
    """Steps that stay, the best, and where it went on."""
    import transformers

    from shardckpt.integrations.huggingface import Trainer

    found: dict[str, Any] = {}
    place, root = folder / "place", folder / "root"
    life(Trainer, place, {"save_total_limit": 2}, checkpoints=root)
    again = life(Trainer, place, {}, resume=str(place / "checkpoint-6"), checkpoints=root)
    found["by the name of a copy, the steps elsewhere"] = again.resumed.step
    short: Mapping[str, Any] = {"save_total_limit": 2, "max_steps": 4, "save_steps": 1}
    life(Trainer, place, short, checkpoints=root)
    found["of a new training the newest stay"] = (steps_in(root), folders_in(place))
    life(Trainer, place, {"max_steps": 1}, checkpoints=root)  # of which step 4 is not
    options = {**BEST, "max_steps": 6, "save_steps": 6}
    best = life(Trainer, place, options, checkpoints=root)
    found["a step of an earlier training is not the best of this one"] = best.state.best_model_checkpoint
    theirs = folder / "theirs"
    life(transformers.Trainer, theirs, {"max_steps": 4})
    for asked in (True, "auto"):
        trainer = evaluated(Trainer)(small_model(), arguments(theirs, max_steps=6), train_dataset=rows(16))
        began: list[int] = []
        trainer.add_callback(_noting(began))
        trainer.train(resume_from_checkpoint=asked)
        found[f"what Trainer itself has written, {asked}"] = (began[0], steps_in(theirs))
        for step in steps_in(theirs):
            for path in (theirs / f"step_{step}").iterdir():
                path.unlink()
    return found


def _noting(began: list[int]) -> Any:
    from transformers import TrainerCallback

    class Note(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            began.append(state.global_step)

    return Note()
