"""What Trainer's options mean, here and there: the same training with Trainer's own checkpoints and with ours."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import shardckpt as sc
from tests.integrations.huggingface.jobs import Place, arguments, rows, small_model

SCORES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 5.0}
"""Of the evaluations: the best step is neither the first nor the last."""
BEST = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "load_best_model_at_end": True}
CASES: Mapping[str, Mapping[str, Any]] = {
    "two, the best among them": {"save_total_limit": 2} | BEST,
    "the best alone": {"save_total_limit": 1} | BEST,
    "only when better": {"save_strategy": "best", **BEST, "save_total_limit": 1},
    "each epoch": {"save_strategy": "epoch", "save_total_limit": 1},
    "all stay": {},
    "the last two": {"save_total_limit": 2},
    "the model alone": {"save_only_model": True, "save_steps": 4},
    "never": {"save_strategy": "no"},
}
"""The first three are a sample."""


def evaluated(kind: Any) -> Any:
    """The class of a trainer whose evaluations come out as in SCORES."""

    class Evaluated(kind):  # type: ignore[misc]
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {"eval_loss": SCORES[self.state.global_step]}

    return Evaluated


def life(kind: Any, folder: Path, options: Mapping[str, Any], *, resume: Any = None, **more: Any) -> Any:
    model, data = small_model(), rows(16)
    trainer = evaluated(kind)(model, arguments(folder, **options), train_dataset=data, eval_dataset=data[:4], **more)
    torch.manual_seed(7)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def outcome(trainer: Any, kept: list[int]) -> dict[str, Any]:
    """What must be the same."""
    best = trainer.state.best_model_checkpoint
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "kept": kept,
        "best": (trainer.state.best_global_step, best and os.path.basename(best)),
        "weights": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
    }


def folders_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def steps_in(folder: Path) -> list[int]:
    with sc.CheckpointManager(folder) as manager:
        return manager.steps()


def compare(rank: int, world_size: int, shared: Path, folder: Path, cases: list[str]) -> dict[str, list[str]]:
    """For each case, what differs between the two."""
    import transformers
    from transformers import GPT2LMHeadModel

    from shardckpt.integrations.huggingface import Trainer

    found: dict[str, list[str]] = {}
    for number, name in enumerate(cases):
        options = CASES[name]
        theirs, ours = folder / f"theirs_{number}", folder / f"ours_{number}"
        there = life(transformers.Trainer, theirs, options)
        expected = outcome(there, folders_in(theirs))
        here = life(Trainer, ours, options)
        seen = outcome(here, steps_in(ours))
        differ = [key for key in ("losses", "kept", "best") if seen[key] != expected[key]]
        differ += [key for key, tensor in expected["weights"].items() if not torch.equal(tensor, seen["weights"][key])]
        if folders_in(ours) != seen["kept"]:
            differ.append(f"copies: {folders_in(ours)}")
        for step in seen["kept"]:
            opened = [GPT2LMHeadModel.from_pretrained(place / f"checkpoint-{step}") for place in (theirs, ours)]
            states = [model.state_dict() for model in opened]
            differ += [f"{step}: {key}" for key in states[0] if not torch.equal(states[0][key], states[1][key])]
        found[name] = [*differ, *([] if expected["kept"] or name == "never" else ["nothing was kept"])]
    return found


def resume_in_every_way(rank: int, world_size: int, shared: Path, folder: Path) -> dict[str, Any]:
    """What each way of resuming came to: the step, and whether the losses are those of one life."""
    import transformers
    from transformers import GPT2LMHeadModel

    from shardckpt.integrations.huggingface import Trainer, from_pretrained

    theirs, ours = folder / "theirs", folder / "ours"
    life(transformers.Trainer, theirs, {"max_steps": 6})
    whole = outcome(life(Trainer, ours, {}), [])["losses"]
    place = Place(str(ours), folder / "elsewhere")
    half = outcome(life(transformers.Trainer, folder / "half", {}, resume=str(theirs / "checkpoint-4")), [])["losses"]
    found: dict[str, Any] = {}

    def tell(name: str, trainer: Any, expected: list[float]) -> None:
        own = outcome(trainer, [])["losses"]
        found[name] = (trainer.resumed and trainer.resumed.step, own == expected)

    straight = from_pretrained(GPT2LMHeadModel, ours, step=6).state_dict()
    copy = GPT2LMHeadModel.from_pretrained(ours / "checkpoint-6").state_dict()
    found["from_pretrained of a step"] = all(torch.equal(straight[name], copy[name]) for name in copy)
    part = ours / ".checkpoint-4.part"
    part.mkdir()
    shutil.rmtree(ours / "checkpoint-2")
    tell("by the name of the copy", life(Trainer, ours, {}, resume=str(ours / "checkpoint-4")), whole)
    found["copies that a killed job left undone"] = (ours / "checkpoint-2").is_dir() and not part.exists()
    again = life(Trainer, folder / "other", {}, resume=f"{ours}/step_6")
    tell("a step of another run", again, whole)
    tell("what Trainer wrote", life(Trainer, folder / "new", {}, resume=str(theirs / "checkpoint-4")), half)
    life(Trainer, theirs, {"max_steps": 2})
    found["what Trainer wrote stays"] = (theirs / "checkpoint-2" / "optimizer.pt").exists() and steps_in(theirs) == [2]
    try:
        life(Trainer, folder / "nothing", {}, resume=True)
    except ValueError as error:
        found["nothing there"] = str(error)
    tell("auto, nothing there", life(Trainer, folder / "nothing", {}, resume="auto"), whole)
    broken = next(path for path in (ours / "step_8").iterdir() if path.suffix == ".pt" and "model" not in path.name)
    broken.write_bytes(broken.read_bytes()[:-5000] + bytes(5000))
    tell("past a damaged step", life(Trainer, place.folder, {}, resume=True, checkpoints=str(ours)), whole)
    return found


def refused(rank: int, world_size: int, shared: Path, folder: Path) -> list[str]:
    """What it says to what it cannot do."""
    import transformers

    from shardckpt.errors import InvalidOperationError
    from shardckpt.integrations.huggingface import Trainer

    trainer = Trainer(small_model(), arguments(folder), train_dataset=rows(4))
    told = []
    try:
        trainer._save_checkpoint(trainer.model, None)
    except InvalidOperationError as error:
        told.append(str(error))
    trainer.is_deepspeed_enabled = True
    try:
        trainer.train()
    except InvalidOperationError as error:
        told.append(str(error))
    trainer.is_deepspeed_enabled = False
    trainer.args.push_to_hub = True
    watched = logging.getLogger("shardckpt.integrations.huggingface.refusing")
    watched.addFilter(lambda record: told.append(record.getMessage()) or True)
    trainer.train()
    finalize = transformers.Trainer._finalize_training
    del transformers.Trainer._finalize_training
    try:
        trainer.train()
    except InvalidOperationError as error:
        told.append(str(error).replace(transformers.__version__, "5.0"))
    finally:
        transformers.Trainer._finalize_training = finalize
    return told
