"""A training that torchrun starts, and starts again when a rank has died; its numbers are those of any count of ranks.

Before it trains, a record that is lost is rebuilt, and the newest step loaded; then it trains, saves and prunes. What
phase a rank is in and what it was told to be committed it says at once, a line for each, for whoever kills it. Started
by `test_torchrun.py`, with a `Training` as JSON; undisturbed, on ranks of the pool, it is what must come out.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardckpt as sc

ROWS = 8
"""Of one batch, of all ranks together."""
WIDTH = 128
PATIENCE = timedelta(seconds=30)


@dataclass(frozen=True)
class Training:
    root: str
    last_step: int
    lost: int = 0
    """The step whose record is rebuilt if it is not there and nothing newer is; 0: none."""
    process: bool = False
    """Whether another process of each rank writes."""
    kills: int = 0
    """So many lives are to be killed, and wait for that before the last step."""
    ranks: int = 1
    """In its first life it waits until there are so many."""
    patience_s: float = PATIENCE.total_seconds()

    @property
    def patience(self) -> timedelta:
        return timedelta(seconds=self.patience_s)

    def text(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Line:
    """What a rank says: that a phase begins, or what it has computed or been told."""

    word: str
    rank: int
    pid: int
    step: int
    life: int
    """How often torchrun had started this worker anew."""
    at_s: float
    """Of the machine's clock, which all of its processes share."""
    value: str = ""

    def text(self) -> str:
        return f"{self.word} {self.rank} {self.pid} {self.step} {self.life} {self.at_s} {self.value}"

    @classmethod
    def parse(cls, text: str) -> Line | None:
        """None for what others print."""
        with suppress(ValueError):
            word, rank, pid, step, life, at_s, value = text.rstrip("\n").split(" ")
            return cls(word, int(rank), int(pid), int(step), int(life), float(at_s), value)
        return None


Say = Callable[..., object]
"""`say(word, step, value="")`"""


class SharedRng(sc.RngState):
    """The stream is the same on all ranks, also on a new number of them."""

    new_world = "first"


def train(training: Training, gangs: sc.Gangs, say: Say) -> None:
    """One life of one rank: from the newest step to the last one."""
    model, optimizer = make_model(gangs.root.size)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "rng": SharedRng()}
    with sc.CheckpointManager(
        training.root, gangs, timeout=training.patience, manners=sc.Manners(process=training.process)
    ) as checkpoints:
        bring_back(training, checkpoints, gangs, say)
        say("load", 0)
        resumed = checkpoints.resume(state)
        first = resumed.step if resumed else 0
        say("resumed", first)
        for step in range(first + 1, training.last_step + 1):
            if step == training.last_step and restarts() < training.kills:
                say("waits", step)
                threading.Event().wait()
            say("train", step)
            say("loss", step, train_step(model, optimizer, gangs, step).hex())
            say("save", step)
            checkpoints.save(step, state).result()
            say("told", step)
            say("prune", step)
            checkpoints.keep_last_n_checkpoints(2)
    say("ended", training.last_step, total(model).hex())


def bring_back(training: Training, checkpoints: sc.CheckpointManager, gangs: sc.Gangs, say: Say) -> None:
    """Rank 0 rebuilds the record, while the others wait."""
    if not training.lost or max(checkpoints.steps(), default=0) >= training.lost:
        return
    say("repair", training.lost)
    if gangs.root.rank == 0:
        sc.repair(training.root, step=training.lost, apply=True)
    if gangs.root.size > 1:
        dist.barrier()


def make_model(ranks: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 16)]
    model = torch.nn.Sequential(*layers).double()
    if ranks > 1:
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def total(model: torch.nn.Module) -> float:
    parts = [part.full_tensor() if isinstance(part, DTensor) else part for part in model.parameters()]
    return float(sum(part.detach().square().sum() for part in parts))


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, gangs: sc.Gangs, step: int) -> float:
    """One update with this rank's share of the batch; gives the mean loss over all ranks."""
    share = ROWS // gangs.root.size
    inputs = torch.randn(ROWS, 16, dtype=torch.float64)  # the same on all ranks: the stream that is saved and resumed
    inputs = inputs[gangs.root.rank * share :][:share]
    loss = (model(inputs) - inputs.flip(1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach() / gangs.root.size
    if gangs.root.size > 1:
        dist.all_reduce(mean)
    return float(mean)


def undisturbed(rank: int, size: int, folder: Path, training: Training) -> list[Line]:
    """On a rank of the pool: what it says."""
    lines: list[Line] = []
    gangs = sc.Gangs.from_env()
    try:
        train(training, gangs, saying(rank, lines.append))
    finally:
        gangs.close()
    return lines


def restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def saying(rank: int, take: Callable[[Line], object]) -> Say:
    pid, life = os.getpid(), restarts()
    return lambda word, step, value="": take(Line(word, rank, pid, step, life, time.monotonic(), value))


def main() -> None:
    torch.set_num_threads(1)
    training = Training(**json.loads(sys.argv[1]))
    if int(os.environ["WORLD_SIZE"]) < training.ranks and restarts() == 0:
        threading.Event().wait()  # torchrun ends it when another node has come
    dist.init_process_group("gloo", timeout=training.patience)
    gangs = sc.Gangs.from_env()
    # At once and in one piece: the ranks share one output.
    say = saying(gangs.root.rank, lambda line: os.write(1, f"{line.text()}\n".encode()))
    train(training, gangs, say)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
