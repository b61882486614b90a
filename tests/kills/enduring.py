"""A training that goes on until it is told to end, whatever is done to its ranks, its nodes and its storage.

Started by `soak.py`, under torchrun with an `Enduring` as JSON, or on ranks of the pool. Every rank computes the whole
batch: mean and sums of 1, 2 or 4 equal numbers are exact, so that all numbers are those of one undisturbed process, to
the last bit, however many ranks there were on the way. Saves go on while it trains; one that fails is said, and
training goes on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import shardckpt as sc
from tests.kills.elastic import ROWS, Line, Say, SharedRng, make_model, saying, total

PATIENCE = timedelta(seconds=20)
KEPT = 3


@dataclass(frozen=True)
class Enduring:
    root: str
    notes: str
    """The file into which all ranks write what they say, a line at a time."""
    until: str
    """When this file is there, the step under way is the last one."""
    options: dict[str, str] = field(default_factory=dict)
    """Of the storage."""

    def text(self) -> str:
        return json.dumps(asdict(self))


def endure(work: Enduring, gangs: sc.Gangs, say: Say) -> None:
    """One life of one rank."""
    model, optimizer = make_model(gangs.root.size)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "rng": SharedRng()}
    keep = sc.KeepLast(KEPT)
    saving = sc.SavePolicy(verify_copies=True)
    options = work.options or None
    with sc.CheckpointManager(
        work.root, gangs, keep=keep, timeout=PATIENCE, saving=saving, tolerate=10**6, storage_options=options
    ) as checkpoints:
        say("load", 0)
        resumed = checkpoints.resume(state)
        first = resumed.step if resumed else 0
        say("resumed", first)
        pending: sc.PendingSave | None = None
        for step in count(first + 1):
            say("train", step)
            loss, ends = one_step(model, optimizer, gangs, ends=Path(work.until).exists())
            say("loss", step, loss.hex())
            settle(pending, say)
            say("save", step)
            pending = checkpoints.save(step, state)
            if ends:
                break
        settle(pending, say)
    say("ended", step, total(model).hex())


def settle(pending: sc.PendingSave | None, say: Say) -> None:
    """Say how the save before has ended."""
    if pending is None:
        return
    try:
        say("told", pending.result().step)
    except sc.CheckpointError as error:
        say("failed", pending.step, type(error).__name__)


def one_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, gangs: sc.Gangs, *, ends: bool
) -> tuple[float, bool]:
    """One update; the loss, and whether any rank says that it was the last."""
    inputs = torch.randn(ROWS, 16, dtype=torch.float64)  # from the stream that is saved and resumed
    loss = (model(inputs) - inputs.flip(1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    told = torch.tensor([float(loss.detach()) / gangs.root.size, float(ends)], dtype=torch.float64)
    if gangs.root.size > 1:
        dist.all_reduce(told)
    return float(told[0]), bool(told[1])


def undisturbed() -> Iterator[tuple[int, float, float]]:
    """What it must be, step by step: the loss, and the sum of the squares of the parameters after it. It uses the
    random stream of this process."""
    model, optimizer = make_model(1)
    for step in count(1):
        loss, _ = one_step(model, optimizer, sc.Gangs.local(), ends=False)
        yield step, loss, total(model)


@contextmanager
def writing(notes: str) -> Iterator[Callable[[Line], object]]:
    """Whole lines, in the order in which they were said."""
    file = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        yield lambda line: os.write(file, f"{line.text()}\n".encode())
    finally:
        os.close(file)


def in_pool(rank: int, size: int, folder: Path, work: Enduring) -> None:
    """A life on a rank of the pool."""
    gangs = sc.Gangs.from_env()
    try:
        with writing(work.notes) as take:
            endure(work, gangs, saying(rank, take))
    finally:
        gangs.close()


def main() -> None:
    torch.set_num_threads(1)
    work = Enduring(**json.loads(sys.argv[1]))
    dist.init_process_group("gloo", timeout=PATIENCE)
    gangs = sc.Gangs.from_env()
    with writing(work.notes) as take:
        endure(work, gangs, saying(gangs.root.rank, take))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
