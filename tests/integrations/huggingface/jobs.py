"""Small trainings of Hugging Face's frameworks, on real text. Frameworks are imported in functions only: these run in
processes that have them."""

from __future__ import annotations

import io
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shardckpt.demo.text import read_text
from shardckpt.integrations.huggingface import CheckpointOptions

PRELOAD = ("transformers.trainer", "transformers.models.gpt2.modeling_gpt2", "accelerate", "peft", "datasets", "s3fs")
CONTEXT = 32


@dataclass(frozen=True)
class Place:
    """Where a training keeps its steps, and where its folder is."""

    root: str
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)

    def checkpoints(self, **more: Any) -> CheckpointOptions:
        return CheckpointOptions(root=self.root, storage_options=self.options, **more)


@dataclass(frozen=True)
class Seen:
    """What one rank saw of a training."""

    losses: dict[int, float]
    resumed: int | None
    """The step that it went on from."""
    steps: list[int]
    """Committed at the end."""
    best: tuple[int | None, str | None]
    checks: dict[str, Any] = field(default_factory=dict)


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    text = torch.from_numpy(read_text()[: count * CONTEXT].copy()).long()
    return [{"input_ids": row, "labels": row} for row in text.view(count, CONTEXT)]


def small_model(seed: int = 0, *, lora: bool = False) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"))
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1))


def arguments(folder: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    usual: dict[str, Any] = {
        "max_steps": 8,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "ddp_backend": "gloo" if torch.distributed.is_initialized() else None,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(usual | options))


def killed_after_save_of(step: int, *, on_rank: int) -> Any:
    """A callback: SIGKILL right after `save` of that step has come back, in the middle of its writing."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step and args.process_index == on_rank:
                os.kill(os.getpid(), signal.SIGKILL)

    return Kill()


def told_to_stop_in(step: int) -> Any:
    """A callback: SIGTERM to this process in the middle of a step."""
    from transformers import TrainerCallback

    class Terminate(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    return Terminate()


def train(
    rank: int,
    world_size: int,
    folder: Path,
    place: Place,
    options: Mapping[str, Any],
    *,
    resume: Any = None,
    kill_at: int | None = None,
    lora: bool = False,
    term_at: int | None = None,
) -> Seen:
    """One life of a training with `Trainer`."""
    from shardckpt.integrations.huggingface import Trainer

    model = small_model(lora=lora)
    data = rows(20 * world_size)  # so that a run sees the end of an epoch
    last = world_size - 1
    callbacks = [] if kill_at is None else [killed_after_save_of(kill_at, on_rank=last)]
    if term_at is not None and rank == last:
        callbacks.append(told_to_stop_in(term_at))
    trainer = Trainer(
        model,
        arguments(place.folder, **options),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=callbacks,
        checkpoints=place.checkpoints(on_open=lambda checkpoints: checkpoints.stop_on()),
    )
    torch.manual_seed(1_000 + rank)
    trainer.train(resume_from_checkpoint=resume)
    return seen_by(trainer, place)


def seen_by(trainer: Any, place: Place) -> Seen:
    import shardckpt as sc

    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    with sc.CheckpointManager(place.root, sc.Gangs.local(), storage_options=place.options) as manager:
        steps = manager.steps()
    resumed = trainer.resumed.step if trainer.resumed is not None else None
    return Seen(losses, resumed, steps, (trainer.state.best_global_step, trainer.state.best_model_checkpoint))


def killed(rank: int, world_size: int, folder: Path, place: Place, options: Mapping[str, Any], kill_at: int) -> Seen:
    return train(rank, world_size, folder, place, options, kill_at=kill_at)


def resumed(rank: int, world_size: int, folder: Path, place: Place, options: Mapping[str, Any]) -> Seen:
    return train(rank, world_size, folder, place, options, resume=True)


def with_accelerate(
    rank: int, world_size: int, folder: Path, place: Place, kill_at: int | None, resume: bool, sharded: bool = False
) -> Seen:
    """One life of a training with `Accelerator`: two epochs of five steps, saved every second step."""
    from accelerate import skip_first_batches
    from accelerate.utils import DataLoaderConfiguration
    from torch.distributed.fsdp import fully_shard
    from torch.utils.data import DataLoader

    from shardckpt.integrations.huggingface import Accelerator

    order = DataLoaderConfiguration(use_seedable_sampler=True)  # as for any resume in the middle of an epoch
    accelerator = Accelerator(cpu=True, dataloader_config=order, checkpoints=place.checkpoints())
    torch.manual_seed(5)
    loader = accelerator.prepare(DataLoader(rows(20 * world_size), batch_size=4, shuffle=True))
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    model = small_model()
    if sharded:
        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    if sharded:  # Accelerate would put DDP around it
        accelerator.save_state_of(model=model)
        optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    else:
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    torch.manual_seed(1_000 + rank)
    if resume:
        accelerator.load_state()
    resumed = counter.steps
    for epoch in range(counter.steps // 5, 2):
        loader.set_epoch(epoch)
        batches = skip_first_batches(loader, counter.steps % 5) if counter.steps % 5 else loader
        for batch in batches:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            counter.count(accelerator.gather(loss.detach()[None]).mean().item())
            if counter.steps % 2 == 0:
                accelerator.save_state(f"somewhere/checkpoint-{counter.steps}")
                if counter.steps == kill_at and rank == world_size - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
    accelerator.checkpoints.wait()
    steps = accelerator.checkpoints.steps()
    accelerator.end_training()
    return Seen(dict(enumerate(counter.losses, start=1)), resumed if resume else None, steps, (None, None))


class Counter:
    """A thing of one's own with a state."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    @property
    def steps(self) -> int:
        return len(self.losses)

    def count(self, loss: float) -> None:
        self.losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.losses = list(state_dict["losses"])


def lora(rank: int, world_size: int, folder: Path, place: Place, kill_at: int | None, resume: bool) -> Seen:
    options: dict[str, Any] = {"learning_rate": 1e-2}
    return train(rank, world_size, folder, place, options, kill_at=kill_at, resume=resume or None, lora=True)


def lora_looked_at(rank: int, world_size: int, folder: Path, place: Place) -> dict[str, Any]:
    """A small adapter over a base that is larger, and what its steps are good for."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    import shardckpt as sc
    from shardckpt.errors import InvalidStateError
    from shardckpt.integrations.huggingface import Trainer, adapter_only, from_pretrained

    def base(seed: int) -> Any:
        torch.manual_seed(seed)
        sizes = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": 128, "n_layer": 4, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model, other = get_peft_model(base(0), config), get_peft_model(base(1), config)
    options = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-1}
    trainer = Trainer(model, arguments(place.folder, **options), train_dataset=rows(16))
    trainer.train()
    trained = model.state_dict()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with sc.CheckpointManager(place.root) as manager:
        plan = manager.plan(2, {"model": other}, policy=adapter_only(other))
        manager.load(2, {"model": other}, policy=adapter_only(other))
    after = other.state_dict()
    is_own = {name: "lora_" in name for name in after}
    try:
        adapter_only(GPT2LMHeadModel(GPT2Config(n_embd=4, n_layer=1, n_head=1)))
    except InvalidStateError as error:
        refused = str(error)
    try:
        from_pretrained(GPT2LMHeadModel, place.root)
    except InvalidStateError as error:
        no_base = str(error).partition(": ")[2]
    again = PeftModel.from_pretrained(base(0), place.folder / "checkpoint-2").state_dict()
    return {
        "adapter is that of the step": all(torch.equal(after[n], trained[n]) for n, own in is_own.items() if own),
        "base stays as it was": all(torch.equal(after[n], before[n]) for n, own in is_own.items() if not own),
        "no more is read": plan.nbytes == sum(tensor.nbytes for name, tensor in trained.items() if is_own[name]),
        "PEFT opens the copy": again.keys() == trained.keys() and all(torch.equal(again[n], trained[n]) for n in again),
        "only the adapter is in it": not (place.folder / "checkpoint-2" / "model.safetensors").exists(),
        "a model without an adapter": refused,
        "from_pretrained": no_base,
    }


def program(rank: int, world_size: int, folder: Path, file: Path, argv: list[str]) -> str:
    """Run it as a script; what it printed. The group that it is to make itself is there already."""
    os.chdir(folder)
    sys.argv = [str(file), *argv]
    printed = io.StringIO()
    with redirect_stdout(printed):
        runpy.run_path(str(file), run_name="__main__")
    return printed.getvalue()


def stopped(rank: int, world_size: int, folder: Path, place: Place, options: Mapping[str, Any], term_at: int) -> Seen:
    return train(rank, world_size, folder, place, options, term_at=term_at)
