"""`launch/loop.py`, killed in the middle and run again: the losses are those of a run that nobody has stopped.

torch.compile, mixed precision with a gradient scaler, accumulation, a sampler in the middle of an epoch, dropout.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.house.source import ROOT
from tests.integrations.forks import Forks
from tests.storage.conftest import place, s3
from tests.storage.s3server import S3Server

__all__ = ["place", "s3"]  # fixtures
pytestmark = [pytest.mark.xdist_group("plain loop"), pytest.mark.timeout(120)]

PROGRAM = ROOT / "launch" / "loop.py"
LAST, KILLED_AT, RESUMED = 14, 13, (6, 11)
Losses = dict[int, float]
inductor = [
    pytest.mark.larger,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's own backend needs a C++ compiler: g++"),
]


@dataclass
class Lines:
    """Takes what the program prints, and keeps the losses; kills the process when it has told of a step."""

    file: Path
    killed_at: int

    def write(self, text: str) -> int:
        with self.file.open("a") as file:
            file.write(text)
        if text.startswith(f"step {self.killed_at} "):
            os.kill(os.getpid(), signal.SIGKILL)
        return len(text)

    def flush(self) -> None: ...


def train(
    rank: int, world_size: int, folder: Path, to: Path, arguments: list[str], killed_at: int, server: dict[str, str]
) -> None:
    """As `torchrun` would; the process group is there already. In a process that ends afterwards."""
    os.environ.update(server, TORCHINDUCTOR_CACHE_DIR=str(to.parent / "inductor"), TORCHINDUCTOR_COMPILE_THREADS="1")
    dist.init_process_group = dist.destroy_process_group = lambda *args: None
    sys.argv, sys.stdout = [str(PROGRAM), "--compile", "eager", *arguments], Lines(to / f"rank_{rank}", killed_at)
    runpy.run_path(str(PROGRAM), run_name="__main__")


def losses(folder: Path, ranks: int) -> list[Losses]:
    """By rank; of a step that was done twice, those of the second time."""
    lines = [[line.split() for line in (folder / f"rank_{rank}").read_text().splitlines()] for rank in range(ranks)]
    return [{int(step): float(loss) for _, step, _, loss in own} for own in lines]


@pytest.fixture
def run(forks: Forks, tmp_path: Path) -> Callable[..., Any]:
    def run(ranks: int, name: str, root: str, *more: str, last: int = LAST, killed_at: int = 0, **server: str) -> Any:
        to = tmp_path / name
        to.mkdir(exist_ok=True)
        (terms := [root, "--steps", str(last), *more])
        ended = forks.run_settled(ranks, train, to, terms, killed_at, server, preload=["tests.integrations.compiled"])
        assert [one.killed for one in ended] == [signal.SIGKILL if killed_at else 0] * ranks, ended
        assert not any(one.trace for one in ended), ended
        return losses(to, ranks)

    return run


@pytest.mark.s3
@pytest.mark.parametrize(
    ("ranks", "where", "more"),
    [
        (1, "file", ()),
        (1, "s3", ()),
        (2, "file", ("--fsdp",)),
        (2, "s3", ()),
        pytest.param(1, "file", ("--compile", "inductor"), marks=inductor),
        pytest.param(2, "file", ("--compile", "inductor"), marks=inductor),
    ],
    ids=["alone-file", "alone-s3", "fsdp-file", "ddp-s3", "inductor", "inductor-ddp"],
)
@pytest.mark.sampled(2)
def test_killed_and_run_again_it_has_the_losses_of_one_that_was_not(
    run: Callable[..., Any], tmp_path: Path, ranks: int, where: str, more: Any, s3: S3Server, place: Any
) -> None:
    whole = run(ranks, "whole", str(tmp_path / "a"), *more)
    assert [sorted(own) for own in whole] == [list(range(1, LAST + 1))] * ranks
    server = {
        "AWS_ENDPOINT_URL_S3": s3.endpoint,
        "AWS_ACCESS_KEY_ID": s3.access_key,
        "AWS_SECRET_ACCESS_KEY": s3.secret_key,
    }
    root, server = (place(s3), server) if where == "s3" else ((tmp_path / "b").as_uri(), {})
    begun = run(ranks, "begun", root, *more, killed_at=KILLED_AT, **server)
    assert all(max(own) >= KILLED_AT - 1 for own in begun)
    rest = run(ranks, "rest", root, *more, **server)
    first = min(rest[0])
    assert first in RESUMED  # the save of step 10 waits for that of step 5, and may have been killed itself
    assert [sorted(own) for own in rest] == [list(range(first, LAST + 1))] * ranks
    assert [{**one, **other} for one, other in zip(begun, rest, strict=True)] == whole, "bit for bit"


def test_on_another_number_of_ranks_it_goes_on_with_the_samples_that_are_left(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """88 samples: two ranks have taken 80 of them by step 5, one alone has the last 8, at step 6, and then all anew."""
    run(2, "two", str(tmp_path / "root"), last=5)
    (alone,) = run(1, "one", str(tmp_path / "root"), last=8)
    assert sorted(alone) == [6, 7, 8]
