"""What Accelerate's words mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shardckpt.errors import CheckpointNotFoundError, InvalidOperationError
from shardckpt.tools.moving.step import StepSource


def made(**options: Any) -> tuple[Any, list[torch.nn.Module]]:
    """An accelerator with two models and their optimizers."""
    from accelerate.utils import ProjectConfiguration

    from shardckpt.integrations.huggingface import Accelerator

    project = ProjectConfiguration(**options.pop("project", {}))
    accelerator = Accelerator(cpu=True, project_config=project, **options)
    models = [torch.nn.Linear(3, 3), torch.nn.Linear(2, 2)]
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    prepared = accelerator.prepare(*models, *optimizers)
    for model, optimizer in zip(prepared[:2], prepared[2:], strict=True):
        model(torch.ones(1, model.in_features)).sum().backward()
        optimizer.step()
    return accelerator, list(prepared[:2])


def weights(models: list[torch.nn.Module]) -> list[torch.Tensor]:
    return [model.weight.detach().clone() for model in models]


def keep_their_meaning(rank: int, world_size: int, shared: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    project = {"project_dir": str(folder / "named"), "automatic_checkpoint_naming": True, "total_limit": 2}
    first, models = made(project=project)
    for _ in range(3):
        first.save_state()
    saved = weights(models)
    first.end_training()

    second, models = made(project=project)
    info = second.load_state()
    found["automatic names, the last two"] = second.checkpoints.steps()
    found["iteration after a load"] = second.save_iteration
    found["all is as it was"] = info.step == 2 and all(map(torch.equal, weights(models), saved))
    second.end_training()

    place = folder / "hooked" / "checkpoint-7"
    third, models = made()
    third.register_save_state_pre_hook(lambda models, weights, place: weights.pop(0))
    third.save_state(place).result()
    third.end_training()
    with StepSource.open(folder / "hooked") as step:
        found["what a hook leaves to us"] = sorted(
            {name.partition(".")[0] for name in step.tensors} & {"model", "model_1"}
        )
    fourth, models = made()
    fourth.register_load_state_pre_hook(lambda models, place: models.pop(0))
    before = weights(models)
    fourth.load_state(place)
    now = weights(models)
    found["the hook's stays, ours is loaded"] = (torch.equal(now[0], before[0]), torch.equal(now[1], before[1]))
    found["a step by its folder"] = fourth.checkpoints.steps()
    fourth.end_training()
    return found | go_elsewhere(folder) | asked_in_vain(folder)


def go_elsewhere(folder: Path) -> dict[str, Any]:
    """From one run into another; names that are taken; hooks that want a folder."""
    found: dict[str, Any] = {}
    one, models = made()
    one.save_state(folder / "pretrained" / "step_9")
    saved = weights(models)
    one.end_training()
    two, models = made()
    told: list[str] = []
    two.register_save_state_pre_hook(lambda models, weights, place: told.append(place))
    two.load_state(folder / "pretrained" / "step_9")
    found["loaded from another run"] = all(map(torch.equal, weights(models), saved))
    two.save_state(folder / "own" / "step_1")
    two.save_state(step=2)
    found["saved into its own"] = (two.checkpoints.wait(), two.checkpoints.steps())
    two.load_state(folder / "pretrained" / "step_9")
    found["which is left as it was"] = two.checkpoints.steps()
    found["hooks have a folder"] = [(str(Path(place).relative_to(folder)), Path(place).is_dir()) for place in told]
    two.end_training()
    project = {"project_dir": str(folder / "named"), "automatic_checkpoint_naming": True}
    three, _ = made(project=project)
    three.project_configuration.iteration = 2
    try:
        three.save_state()
    except ValueError as error:
        found["a name that is taken"] = str(error).partition(" is in ")[0]
    three.end_training()
    return found


def asked_in_vain(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    fifth, _ = made(checkpoints=folder / "empty")
    found["nothing there, auto"] = fifth.load_state("auto")
    try:
        fifth.load_state()
    except CheckpointNotFoundError as error:
        found["nothing there"] = str(error)
    sixth, _ = made()
    try:
        sixth.save_state()
    except ValueError as error:
        found["nowhere"] = str(error)
    sixth.__class__ = type("DeepSpeeds", (type(sixth),), {"distributed_type": "DEEPSPEED"})
    try:
        sixth.save_state(folder / "step_1")
    except InvalidOperationError as error:
        found["not torch's"] = str(error)
    for accelerator in (fifth, sixth):
        accelerator.end_training()
    return found
