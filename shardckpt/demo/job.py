"""What every rank runs: `torchrun -m shardckpt.demo.job job.json`. The show starts it; see `messages.Job`."""

from __future__ import annotations

import faulthandler
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

import shardckpt as sc
from shardckpt.demo import messages
from shardckpt.demo.messages import SIZES, Job, Reporter, Resumed, Run, Saved, Started, Stepped, Training, Writing
from shardckpt.demo.model import Rows, Transformer, local_gradient, shard, split_over_tp
from shardckpt.demo.text import GlobalBatches, blot, read_text
from shardckpt.gang.wire.ending import leave
from shardckpt.storage import open_storage
from shardckpt.storage.base import Buffer, Storage
from shardckpt.storage.wrapping import StorageWrapper

PEAK_RATE = 1e-3
MAX_NORM = 1.0
TIMEOUT = timedelta(seconds=60)
"""How long ranks wait for each other: in collectives, and in a phase of a save or load."""


def main(path: str) -> None:
    """Read the job, take part in it. Called once per process, by torchrun."""
    job = Job.read(Path(path))
    faulthandler.dump_traceback_later(job.deadline_s, exit=True)  # no rank outlives its job, whoever has died before
    device = begin()
    mesh = init_device_mesh(device.type, (job.mesh.dp, job.mesh.tp), mesh_dim_names=("dp", "tp"))
    with Reporter(job.events) as reporter:
        reporter.tell(Started(rank=dist.get_rank(), pid=os.getpid()))
        try:
            for run in job.runs:
                perform(run, job, mesh, reporter)
        except (sc.CheckpointError, OSError, ValueError) as error:
            reporter.tell(messages.Failed(rank=dist.get_rank(), message=f"{type(error).__name__}: {error}"))
            raise
    dist.destroy_process_group()


def begin() -> torch.device:
    """Join the ranks and make what they compute repeatable. NCCL if there is a GPU for each of them, gloo if not."""
    torch.set_num_threads(1)  # on the CPU, all that it takes: every sum then has one order
    rank_here, ranks_here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= ranks_here
    device = torch.device("cuda", rank_here) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.use_deterministic_algorithms(True)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    return device


def perform(run: Run, job: Job, mesh: DeviceMesh, reporter: Reporter) -> None:
    """One run, from a fresh model or from the newest checkpoint, to the last step. Called on every rank."""
    trainer = Trainer(job.training, mesh)
    if dist.get_rank() == 0:
        reporter.tell(trainer.describe(run.name))
    if not (run.resume or run.save_every):
        for step in range(1, job.training.steps + 1):
            tell_step(reporter, run, step, trainer.train_step())
        return
    root, gangs = place(run, job, reporter), sc.Gangs.from_mesh(mesh)
    with sc.CheckpointManager(root, gangs, timeout=TIMEOUT) as checkpoints:
        first = 1
        if run.resume:
            first = resume(checkpoints, trainer, reporter) + 1
            trainer.forget(run.forget)
        saves = Saves(checkpoints, run, reporter)
        for step in range(first, job.training.steps + 1):
            tell_step(reporter, run, step, trainer.train_step())
            saves.after_step(step, trainer.state)
        saves.wait()
        committed = checkpoints.steps()
    if dist.get_rank() == 0:
        reporter.tell(messages.Finished(run=run.name, committed=committed))


def place(run: Run, job: Job, reporter: Reporter) -> str | Storage:
    """Where the checkpoints go: the root, or on the last rank of a run that is to be killed, a root that stalls."""
    if run.stall_at is None or dist.get_rank() != dist.get_world_size() - 1:
        return job.root
    step = run.stall_at
    return StallingStorage(open_storage(job.root), step, lambda key: reporter.tell(Writing(step=step, key=key)))


class StallingStorage(StorageWrapper):
    """Writes one step's first file up to its middle, announces that, and then never goes on."""

    def __init__(self, inner: Storage, step: int, announce: Callable[[str], None]) -> None:
        super().__init__(inner)
        self._folder = f"step_{step}"
        self._announce = announce

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        if key.startswith((f"{self._folder}.", f"{self._folder}/")):
            parts = self._half_of(key, list(parts))
        return super().put(key, parts)

    def _half_of(self, key: str, parts: list[Buffer]) -> Iterator[Buffer]:
        left = sum(len(part) for part in parts) // 2
        for part in parts:
            if left > 0:
                yield memoryview(part)[:left]
                left -= len(part)
        self._announce(key)
        threading.Event().wait()


def resume(checkpoints: sc.CheckpointManager, trainer: Trainer, reporter: Reporter) -> int:
    """Load the newest checkpoint; give its step. `CheckpointNotFoundError` if there is none."""
    began = time.perf_counter()
    info = checkpoints.resume(trainer.state)
    elapsed_s = time.perf_counter() - began
    if info is None:
        raise sc.CheckpointNotFoundError("there is no checkpoint to resume from")
    committed = checkpoints.steps()
    if dist.get_rank() == 0:
        skipped = list(info.skipped)
        reporter.tell(Resumed(step=info.step, committed=committed, skipped=skipped, elapsed_s=elapsed_s))
    return info.step


def tell_step(reporter: Reporter, run: Run, step: int, loss: float) -> None:
    if dist.get_rank() == 0:
        reporter.tell(Stepped(run=run.name, step=step, loss=loss))


class SharedRng(sc.RngState):
    """The streams are alike on all ranks here (see `model.SampleDropout`): a rank that is new takes up rank 0's."""

    new_world = "first"


class Trainer:
    """A model with all that belongs to its training, on one mesh."""

    def __init__(self, training: Training, mesh: DeviceMesh) -> None:
        random.seed(training.seed)
        np.random.seed(training.seed)
        torch.manual_seed(training.seed)
        config = SIZES[training.size]
        text = read_text(Path(training.text) if training.text else None)
        self.mesh = mesh
        self.device = torch.device(mesh.device_type)
        self.model = shard(Transformer(config).to(self.device), mesh)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1, foreach=False
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(rate_at, steps=training.steps))
        self.data = GlobalBatches(text, batch=training.batch, context=config.context, seed=training.seed)
        self.start_of_data = self.data.state_dict()
        count = training.batch // mesh["dp"].size()
        self.rows = Rows(start=mesh["dp"].get_local_rank() * count, count=count, total=training.batch)
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "data": self.data,
            "rng": SharedRng(),
            "tokens": 0,
        }

    def describe(self, run: messages.RunName) -> messages.Built:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return messages.Built(
            run=run, parameters=parameters, text_nbytes=self.data.text.nbytes, device=self.device.type
        )

    def train_step(self) -> float:
        """One update; gives the mean loss of the global batch before it, the same number on every rank."""
        batch = self.data.next_batch()
        mine = slice(self.rows.start, self.rows.start + self.rows.count)
        inputs, targets = blot(batch[:, :-1])[mine].to(self.device), batch[:, 1:][mine].to(self.device)
        logits = self.model(inputs, self.rows)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        mean_loss, norm = self._mean_loss_and_norm(loss.detach())
        if norm > MAX_NORM:
            for parameter in self.model.parameters():
                local_gradient(parameter).mul_(MAX_NORM / norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.state["tokens"] += targets.shape[1] * self.rows.total
        return mean_loss

    def _mean_loss_and_norm(self, loss: Tensor) -> tuple[float, float]:
        """Mean loss and gradient norm over all ranks, summed in rank order in float64: one gather of three numbers.

        `clip_grad_norm_` cannot be used: under tensor parallelism the parameters lie on different meshes.
        """
        split, whole = torch.zeros(2, dtype=torch.float64, device=self.device).unbind()
        for parameter in self.model.parameters():
            square = local_gradient(parameter).double().square().sum()
            if split_over_tp(parameter):
                split = split + square
            else:
                whole = whole + square
        mine = torch.stack([loss.double(), split, whole])
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine)
        table = torch.stack(parts).view(*self.mesh.shape, 3)  # [dp, tp, 3]: ranks count over tp first
        square_of_norm = table[:, :, 1].sum() + table[:, 0, 2].sum()
        return float(table[:, 0, 0].mean()), math.sqrt(float(square_of_norm))

    def forget(self, what: messages.Forget) -> None:
        """Lose a part of what was resumed."""
        if what == "rng":
            torch.manual_seed(1)
        elif what == "data":
            self.data.load_state_dict(self.start_of_data)


def rate_at(step: int, *, steps: int) -> float:
    """The share of the peak rate after `step` updates: five steps of warmup, then a cosine down to a tenth."""
    warmup = min(5, steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))


class Saves:
    """The saves of a run: starts them, and reports each one when it is over."""

    def __init__(self, checkpoints: sc.CheckpointManager, run: Run, reporter: Reporter) -> None:
        self._checkpoints = checkpoints
        self._run = run
        self._reporter = reporter
        self._pending: list[sc.PendingSave] = []

    def after_step(self, step: int, state: dict[str, Any]) -> None:
        if self._run.save_every and step % self._run.save_every == 0:
            self._pending.append(self._checkpoints.save(step, state))
        while self._pending and self._pending[0].done():
            self._report_oldest()

    def wait(self) -> None:
        while self._pending:
            self._report_oldest()

    def _report_oldest(self) -> None:
        """Raises if the save has failed."""
        pending = self._pending.pop(0)
        info, report = pending.result(3 * TIMEOUT), pending.report
        self._reporter.tell(
            Saved(
                run=self._run.name,
                step=info.step,
                nbytes=info.nbytes,
                stall_s=report.stall_s,
                stage_s=report.stage_s,
                write_s=report.write_s,
                commit_s=report.commit_s,
                total_s=report.total_s,
            )
        )


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
