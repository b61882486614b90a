"""Every parallelism's checkpoint loads on every other's ranks, bit for bit, and training goes on with the same losses.

All pairs: `python -m pytest tests/distributed/test_matrix.py --scale full`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.testing.pool import ProcessPool
from tests.distributed.jobs import checkpoints, keep_reference
from tests.distributed.parallelisms import WAYS, Job, ranks_of
from tests.scorecard import Scale, Scorecard

TRAINED = 2
MORE = 2
ORIGIN = "one process"
TARGETS = [pytest.param(way, marks=[pytest.mark.larger] if ranks_of(way) > 4 else []) for way in WAYS]


def place(root: Path, way: str) -> Path:
    return root / way.replace(" ", "_")


def train_and_save(rank: int, world_size: int, folder: Path, root: Path) -> list[float]:
    """In one process; what is then in it lies beside the run. The losses of the steps after."""
    job = Job(ORIGIN, seed=0)
    for _ in range(TRAINED):
        job.train_step()
    with checkpoints(place(root, ORIGIN), job.mesh) as manager:
        manager.save(TRAINED, job.state()).result()
    keep_reference(root / "reference.pt", job.held())
    return [job.train_step() for _ in range(MORE)]


def save_again(rank: int, world_size: int, folder: Path, root: Path, way: str) -> list[str]:
    """Load the origin, and save it as this parallelism does; what the load made wrong."""
    job = Job(way, seed=1)
    wrong = load(job, place(root, ORIGIN), root / "reference.pt")
    with checkpoints(place(root, way), job.mesh) as manager:
        manager.save(TRAINED, job.state()).result()
    return wrong


@dataclass
class Loaded:
    """What one rank saw of one load."""

    wrong: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    losses: list[float] = field(default_factory=list)


def load_all(rank: int, world_size: int, folder: Path, root: Path, way: str, sources: Sequence[str]) -> list[Loaded]:
    found = []
    for number, source in enumerate(sources):
        job = Job(way, seed=2 + number)
        wrong = load(job, place(root, source), root / "reference.pt")
        names = {name for name, value in job.held().items() if isinstance(value, torch.Tensor)}
        found.append(Loaded(wrong, names, [job.train_step() for _ in range(MORE)]))
    return found


def load(job: Job, run: Path, reference: Path) -> list[str]:
    state = job.state()
    with checkpoints(run, job.mesh) as manager:
        try:
            assert manager.resume(state, policy=job.policy()) is not None
        except sc.CheckpointError as error:
            return [str(error)]
    job.loaded(state)
    return list(job.wrong(torch.load(reference, weights_only=True)))


def is_about(losses: Sequence[float], expected: Sequence[float]) -> bool:
    """Sums are done in another order."""
    return all(math.isclose(*pair, rel_tol=1e-5) for pair in zip(losses, expected, strict=True))


class Runs:
    """What each parallelism has saved, when it is first asked for."""

    def __init__(self, root: Path, pool: ProcessPool) -> None:
        self.root, self._pool = root, pool
        (self.losses,) = pool.run(1, train_and_save, root)
        reference: dict[str, Any] = torch.load(root / "reference.pt", weights_only=True)
        self.names = {name for name, value in reference.items() if isinstance(value, torch.Tensor)}
        self._saved = {ORIGIN}

    def save(self, way: str) -> None:
        if way not in self._saved:
            outcomes = self._pool.run(ranks_of(way), save_again, self.root, way)
            assert outcomes == [[]] * ranks_of(way), f"{ORIGIN} on {way}: {outcomes}"
            self._saved.add(way)


@pytest.fixture(scope="module")
def runs(ranks: ProcessPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("matrix"), ranks)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("matrix")
@pytest.mark.sampled(9)
@pytest.mark.parametrize("way", TARGETS)
def test_every_parallelism_on_every_other(
    ranks: ProcessPool, runs: Runs, scale: Scale, scorecard: Scorecard, way: str
) -> None:
    """Of the others some are taken in a plain run: those that follow it in the table."""
    every = list(WAYS) if ranks_of(way) > 4 or scale.factor is None else [name for name in WAYS if ranks_of(name) <= 4]
    at = every.index(way)
    sources = (every[at + 1 :] + every[: at + 1])[: scale.runs(sample=2, full=len(WAYS))]
    for source in sources:
        runs.save(source)
    outcomes = ranks.run(ranks_of(way), load_all, runs.root, way, sources, timeout=1500)
    wrong = [
        f"{source} on {way}, rank {rank}: {loaded.wrong[:5]}"
        for rank, own in enumerate(outcomes)
        for source, loaded in zip(sources, own, strict=True)
        if loaded.wrong or not is_about(loaded.losses, runs.losses)
    ]
    scorecard.add("matrix of parallelisms: saved on one, loaded on another", runs=len(sources), torn=len(wrong))
    assert not wrong, "\n".join(wrong)
    for number, source in enumerate(sources):
        assert set().union(*(own[number].names for own in outcomes)) == runs.names, (
            f"{source} on {way}: not all is there"
        )
