"""A training of torchtitan's own parts (0.2: Llama 3, optimizers, schedulers, loader, adapter) in the order of its
trainer, which does not run without CUDA. Done by forked ranks, which have imported torchtitan before."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import IterableDataset

from shardckpt.integrations.titan import Checkpointer
from tests.integrations.titan import standins  # noqa: F401  before torchtitan
from tests.integrations.titan.plans import Layout, Plan, Result

# isort: split
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer, OptimizersInBackwardContainer
from torchtitan.config import Checkpoint
from torchtitan.models.llama3 import Llama3StateDictAdapter, Transformer, TransformerModelArgs

ARGS = TransformerModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=16, multiple_of=16)


class Tokens(IterableDataset):
    """Counts what it has given."""

    def __init__(self, rank: int) -> None:
        self.rank, self.given = rank, 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            generator = torch.Generator().manual_seed(1000 * self.rank + self.given)
            self.given += 1
            tokens = torch.randint(0, ARGS.vocab_size, (ARGS.max_seq_len + 1,), generator=generator)
            yield {"input": tokens[:-1]}, tokens[1:]

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.given = state_dict["given"]


class TrainState:
    def __init__(self) -> None:
        self.step = self.ntokens_seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.step, self.ntokens_seen = state_dict["step"], state_dict["ntokens_seen"]


def model_parts(layout: Layout) -> list[Any]:
    torch.manual_seed(0)
    whole = Transformer(ARGS)
    with torch.no_grad():
        whole.init_weights(buffer_device=torch.device("cpu"))
    if layout == "fsdp2":
        for layer in whole.layers.values():
            fully_shard(layer)
        fully_shard(whole)
    if layout != "parts":
        return [whole]
    first, last = Transformer(ARGS), Transformer(ARGS)
    for part in (first, last):
        part.load_state_dict(whole.state_dict())
        part.freqs_cis = whole.freqs_cis.clone()
    del first.layers["1"], last.layers["0"]
    first.norm = first.output = last.tok_embeddings = None
    return [first, last]


def train(rank: int, world_size: int, folder: Path, plan: Plan) -> Result:
    os.environ.update(plan.environ)
    parts = model_parts(plan.layout)
    kind = OptimizersInBackwardContainer if plan.in_backward else OptimizersContainer
    optimizers = kind(parts, torch.optim.AdamW, {"lr": 0.01, "foreach": False})
    schedulers = LRSchedulersContainer(optimizers, lambda step: 0.9**step)
    # An iterator draws a seed, after the load: from the loader's own generator, so that the random streams go on.
    own = {"batch_size": 2, "generator": torch.Generator()}
    loader = ParallelAwareDataloader(Tokens(rank), dp_rank=rank, dp_world_size=world_size, **own)
    adapter, trainer = Llama3StateDictAdapter(ARGS, None), TrainState()
    chosen = {"enable": True, "interval": 3, "async_mode": "async", "keep_latest_k": 2, "last_save_model_only": False}
    checkpointer = (CheckpointManager if plan.theirs else Checkpointer)(
        dataloader=loader,
        model_parts=parts,
        optimizers=optimizers,
        lr_schedulers=schedulers,
        states={"train_state": trainer},
        checkpoint_config=Checkpoint(**{**chosen, "folder": plan.folder, **plan.config}),
        sd_adapter=adapter,
        base_folder=str(folder),
        ft_manager=None,
    )
    torch.manual_seed(7 + rank)
    loaded, losses = checkpointer.load(step=plan.load_step), {}
    batches = iter(loader)
    try:
        while trainer.step < plan.steps:
            trainer.step += 1
            losses[trainer.step] = step_of(parts, optimizers, schedulers, checkpointer, next(batches))
            trainer.ntokens_seen += 1
            if trainer.step == plan.kill_at and rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            checkpointer.save(trainer.step, last_step=trainer.step == plan.steps)
    finally:
        checkpointer.close()
    with torch.no_grad():
        state = {name: value for part in parts for name, value in part.state_dict().items()}
        full = {name: getattr(value, "full_tensor", lambda v=value: v)().clone() for name, value in state.items()}
    return Result(losses, loaded, full, {k: v.clone() for k, v in adapter.to_hf(full).items()})


def step_of(parts: list[nn.Module], optimizers: Any, schedulers: Any, checkpointer: Any, batch: Any) -> float:
    inputs, labels = batch
    optimizers.zero_grad()
    hidden = inputs["input"]
    for part in parts:
        hidden = part(hidden)
    loss = nn.functional.cross_entropy(hidden.flatten(0, 1), labels.flatten()) * torch.rand(())
    loss.backward()
    checkpointer.maybe_wait_for_staging()
    optimizers.step()
    schedulers.step()
    return loss.item()
