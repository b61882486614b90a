"""A training on a streamed data set of `datasets`, whose place is a part of its state."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import shardckpt as sc
from shardckpt.demo.text import read_text
from tests.integrations.huggingface.jobs import Place, Seen

LINES, BATCH = 32, 4


def stream(rank: int, world_size: int) -> Any:
    """Lines of the plays in four shards, shuffled, of which this rank takes its own."""
    from datasets import Dataset
    from datasets.distributed import split_dataset_by_node

    text = bytes(read_text()[: LINES * 33]).decode("latin-1")
    lines = [text[at : at + 33] for at in range(0, len(text), 33)]
    data = Dataset.from_dict({"line": lines}).to_iterable_dataset(num_shards=4)
    return split_dataset_by_node(data.shuffle(seed=3, buffer_size=1), rank, world_size)


def batches(data: Any) -> Iterator[torch.Tensor]:
    found: list[torch.Tensor] = []
    for example in data:
        found.append(torch.tensor(list(example["line"].encode("latin-1"))))
        if len(found) == BATCH:
            yield torch.stack(found)
            found = []


def train(rank: int, world_size: int, folder: Path, place: Place, kill_at: int | None, resume: bool) -> Seen:
    """A plain loop over three epochs of the stream."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(256, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data, progress, losses = stream(rank, world_size), sc.TrainingProgress(), {}
    state = {"model": model, "optimizer": optimizer, "data": data, "progress": progress, "rng": sc.RngState()}
    torch.manual_seed(1_000 + rank)
    with sc.CheckpointManager(place.root, storage_options=place.options) as checkpoints:
        resumed = checkpoints.resume(state) if resume else None
        losses = dict(progress.losses)
        while progress.epoch < 3:
            data.set_epoch(progress.epoch)
            for batch in batches(data):
                loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
                loss.backward()
                for parameter in model.parameters():
                    if world_size > 1:
                        torch.distributed.all_reduce(parameter.grad)
                optimizer.step()
                optimizer.zero_grad()
                progress.advance(loss=loss)
                losses[progress.step] = loss.item()
                if progress.step % 2 == 0:
                    checkpoints.save(progress.step, state)
                if progress.step == kill_at and rank == world_size - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            progress.end_epoch()
        checkpoints.wait()
        return Seen(losses, resumed.step if resumed else None, checkpoints.steps(), (None, None))
