"""Trainings for `assert_resumable`: one with everything that people put into theirs, and ones that forget something."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import shardckpt as sc
from shardckpt.testing.resumable import Training
from tests.distributed.jobs import Job, Layout

Batch = tuple[torch.Tensor, torch.Tensor]


class Noisy(Dataset[Batch]):
    """A rank's samples; each time one is asked for it is another one, by chance of the worker that makes it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __len__(self) -> int:
        return 24

    def __getitem__(self, number: int) -> Batch:
        noise = torch.randn(8) + random.random() + float(np.random.rand())
        return torch.full((8,), number / 24 + self._rank) + 0.1 * noise, torch.tensor(number % 3)


class Batches:
    """A shuffled loader with workers, that goes on in the middle of an epoch.

    Workers take their seeds, and the shuffling its order, from a generator: where that stood when the epoch began, and
    how many batches have been taken since then, is all that there is to know.
    """

    def __init__(self, rank: int, workers: int) -> None:
        self._rank, self._workers, self._taken = rank, workers, 0
        self._generator = torch.Generator().manual_seed(11 + rank)
        self._begin = self._generator.get_state()
        self._batches: Iterator[Batch] | None = None

    def take(self) -> Batch:
        batch = next(self._batches or self._start(), None)
        if batch is None:
            self._taken, self._begin = 0, self._generator.get_state()
            batch = next(self._start())
        self._taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"begin": self._begin.clone(), "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._begin, self._taken = state["begin"], state["taken"]
        self._generator.set_state(self._begin)
        batches = self._start()
        for _ in range(self._taken):
            next(batches)

    def _start(self) -> Iterator[Batch]:
        loader = DataLoader(
            Noisy(self._rank),
            batch_size=4,
            shuffle=True,
            generator=self._generator,
            num_workers=self._workers,
            multiprocessing_context="fork" if self._workers else None,  # not that of the ranks, a server of its own
        )
        with _may_have_children():
            self._batches = iter(loader)
        return self._batches


@contextmanager
def _may_have_children() -> Iterator[None]:
    """The ranks of a pool are daemons, which `multiprocessing` allows no children."""
    process: Any = multiprocessing.current_process()
    was = process._config.pop("daemon", None)
    try:
        yield
    finally:
        if was is not None:
            process._config["daemon"] = was


class Forgetful(sc.RngState):
    """Does not restore one of the random streams."""

    def __init__(self, stream: str) -> None:
        self._stream = stream

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict({**state_dict, self._stream: self.state_dict()[self._stream]})


def everything(
    shape: tuple[int, ...], *, workers: int = 0, forget: str | None = None, without: str | None = None
) -> Training:
    """AMP with a scaler, a schedule, dropout, accumulation of gradients, and chance from every stream; by DDP.

    `forget`: a random stream that is not restored. `without`: a part that is not in the state.
    """
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_factor=1.7, growth_interval=2)
    batches = Batches(rank, workers)

    def step() -> float:
        total = 0.0
        for last in (False, True):
            inputs, labels = batches.take()
            inputs = inputs * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand())
            with nullcontext() if last else model.no_sync():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(inputs), labels) / 2
                scaler.scale(loss).backward()
            total += loss.item()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        return total

    rng = sc.RngState() if forget is None else Forgetful(forget)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "data": batches}
    state |= {"rng": rng}
    return Training({key: part for key, part in state.items() if key != without}, step)


def job_on(shape: tuple[int, int]) -> Training:
    """The job of the tests of meshes, data-parallel x tensor-parallel."""
    job = Job(Layout(*shape), seed=0)
    return Training(job.state(), job.train_step, sc.Gangs.from_mesh(job.mesh))


def drifting(shape: tuple[int, int]) -> Training:
    """One that changes a parameter in what it takes for evaluation, after each load."""
    training = job_on(shape)
    parameter = next(iter(training.state["model"].parameters()))

    class Evaluation:
        def state_dict(self) -> dict[str, Any]:
            return {"done": 1}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            with torch.no_grad():
                parameter.add_(1)

    return Training({**training.state, "evaluation": Evaluation()}, training.step, training.gangs)
