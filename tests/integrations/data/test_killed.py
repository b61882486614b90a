"""A training fed by torchdata's loader, killed in the middle of an epoch and run again: the same losses."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import shardckpt as sc
from tests.integrations.forks import Forks
from tests.storage.conftest import place, s3
from tests.storage.s3server import S3Server

__all__ = ["place", "s3"]  # fixtures
pytestmark = [pytest.mark.xdist_group("plain loop"), pytest.mark.timeout(120)]

LAST, KILLED_AT, EVERY = 12, 9, 3


class Epochs:
    """Counts epochs, as torch's examples do by hand; four batches in each on every rank."""

    def __init__(self, loader: StatefulDataLoader, sampler: DistributedSampler[Any]) -> None:
        self.loader, self.sampler, self.epoch = loader, sampler, 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.sampler.set_epoch(self.epoch)
            yield from self.loader
            self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.loader.load_state_dict(state["loader"])


def train(
    rank: int, world_size: int, folder: Path, root: str, options: dict[str, Any] | None, to: Path, killed_at: int
) -> None:
    torch.manual_seed(0)
    samples = TensorDataset(torch.randn(16 * world_size, 8))
    sampler: DistributedSampler[Any] = DistributedSampler(samples, world_size, rank, seed=5)
    # With a generator of its own: else it draws from torch's stream when it begins, and dropout draws other numbers.
    loader = StatefulDataLoader(samples, 4, sampler=sampler, generator=torch.Generator())
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2))
    model = DistributedDataParallel(model) if world_size > 1 else model
    torch.manual_seed(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    data = Epochs(loader, sampler)
    state = {"model": model, "optimizer": optimizer, "data": data, "rng": sc.RngState()}
    with sc.CheckpointManager(root, storage_options=options) as checkpoints:
        resumed = checkpoints.resume(state)
        first = resumed.step + 1 if resumed else 1
        for step, (inputs,) in zip(range(first, LAST + 1), data, strict=False):
            loss = (model(inputs) - inputs).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with (to / f"rank_{rank}").open("a") as file:
                file.write(f"{step} {loss.item()!r}\n")
            if step == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step % EVERY == 0:
                checkpoints.save(step, state)


def losses(folder: Path, ranks: int) -> list[dict[int, float]]:
    lines = [[line.split() for line in (folder / f"rank_{rank}").read_text().splitlines()] for rank in range(ranks)]
    return [{int(step): float(loss) for step, loss in own} for own in lines]


@pytest.mark.s3
@pytest.mark.parametrize(("ranks", "where"), [(1, "s3"), (2, "file")])
@pytest.mark.sampled(2)
def test_killed_and_run_again_it_has_the_losses_of_one_that_was_not(
    forks: Forks, tmp_path: Path, ranks: int, where: str, s3: S3Server, place: Any
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    root, options = (place(s3), dict(s3.options)) if where == "s3" else ((tmp_path / "root").as_uri(), None)
    preload = ["tests.integrations.compiled"]
    forks.run(ranks, train, str(tmp_path / "other"), None, whole, 0, preload=preload)
    ended = forks.run_settled(ranks, train, root, options, killed, KILLED_AT, preload=preload)
    assert [one.killed for one in ended] == [signal.SIGKILL] * ranks, ended
    before = [len((killed / f"rank_{rank}").read_text().splitlines()) for rank in range(ranks)]
    forks.run(ranks, train, root, options, killed, 0, preload=preload)
    again = [(killed / f"rank_{rank}").read_text().splitlines()[done:] for rank, done in enumerate(before)]
    # The save of step 6 waits for that of step 3, and may have been killed itself.
    assert {int(lines[0].split()[0]) for lines in again} <= {4, 7}
    assert losses(killed, ranks) == losses(whole, ranks), "bit for bit"
    assert [sorted(own) for own in losses(whole, ranks)] == [list(range(1, LAST + 1))] * ranks
