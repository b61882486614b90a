"""A rank of a training under torchrun is killed at a random moment, and torchrun starts all of them again.

It goes on from the newest step that was promised, or a newer one, and comes to what it would have come to undisturbed.
So it does on the ranks that are left when a node is gone.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch.distributed as dist

import shardckpt as sc
from shardckpt.testing.pool import ProcessPool
from tests.kills.agents import HungError, Job, Killer
from tests.kills.elastic import Line, SharedRng, Training, make_model, total, undisturbed
from tests.scorecard import Scale, Scorecard

pytestmark = [pytest.mark.crash, pytest.mark.slow, pytest.mark.timeout(7200)]

RANKS = 2
LOST, LAST = 3, 14
"""The step whose record is lost when the job begins, and the last one of the training."""
KILLS = 2
"""Of one job; a plain run has one."""
GONE_S = 5.0
"""How long what a killed rank has started may take to end by itself."""


@dataclass(frozen=True)
class Expected:
    """A training that nobody disturbs."""

    run: Path
    """Its checkpoints up to `LOST`, whose record is lost."""
    losses: dict[int, float]
    total: float
    usual_s: dict[str, float] = field(default_factory=dict)


@pytest.fixture
def expected(ranks: ProcessPool, tmp_path: Path) -> Expected:
    whole, run, again = tmp_path / "whole", tmp_path / "begun", tmp_path / "again"
    said = ranks.run(RANKS, undisturbed, Training(str(whole), LAST))[0]
    ranks.run(RANKS, undisturbed, Training(str(run), LOST))
    (run / f"step_{LOST}/manifest.json").unlink()
    shutil.copytree(run, again)
    resumed = ranks.run(RANKS, undisturbed, Training(str(again), LAST, LOST))[0]
    losses = {line.step: float.fromhex(line.value) for line in said if line.word == "loss"}
    assert [line.step for line in resumed if line.word == "resumed"] == [LOST]
    made = Expected(run, losses, float.fromhex(said[-1].value))
    timing = Killer(random.Random(0), made.usual_s, 0, RANKS)
    for line in resumed:
        timing.hear(line)
    judge(resumed, made, ranks=(0,))
    return made


def judge(said: list[Line], expected: Expected, *, ranks: tuple[int, ...], close: float = 0.0) -> None:
    """Every life went on from a step that is not older than any that was promised before, with the numbers that belong
    to it, and the last life of these ranks came to the end."""
    promised = LOST
    for line in sorted(said, key=lambda line: line.at_s):  # two agents are heard each by itself
        if line.word == "told":
            promised = max(promised, line.step)
        elif line.word == "resumed":
            assert line.step >= promised, f"step {promised} was promised, and rank {line.rank} goes on from {line.step}"
        elif line.word == "loss":
            assert float.fromhex(line.value) == pytest.approx(expected.losses[line.step], rel=close, abs=0.0), line
    ends = [line for line in said if line.word == "ended"]
    assert sorted(line.rank for line in ends) == list(ranks)
    for line in ends:
        assert float.fromhex(line.value) == pytest.approx(expected.total, rel=close, abs=0.0), line


def judge_what_lies_there(root: Path, expected: Expected, close: float) -> None:
    """As a job of one process finds it."""
    assert sc.verify(root).ok
    model, optimizer = make_model(1)
    with sc.CheckpointManager(root, sc.Gangs.local()) as checkpoints:
        found = checkpoints.resume({"model": model, "optimizer": optimizer, "rng": SharedRng()})
        assert checkpoints.steps()[-2:] == [LAST - 1, LAST]
    assert found is not None
    assert (found.step, found.skipped) == (LAST, ())
    assert total(model) == pytest.approx(expected.total, rel=max(close, 1e-12))  # the order of the sum is another one


def judge_that_nothing_is_left(job: Job) -> None:
    deadline = time.monotonic() + GONE_S
    while left := job.left():
        assert time.monotonic() < deadline, (
            f"{left} still run: {[Path(f'/proc/{pid}/cmdline').read_bytes() for pid in left]}"
        )
        time.sleep(0.05)


def a_job_with_kills(place: Path, expected: Expected, chance: random.Random, kills: int) -> Killer:
    shutil.copytree(expected.run, place)
    options = ["--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", str(kills)]
    training = Training(str(place), LAST, LOST, process=chance.random() < 0.5, kills=kills)
    killer = Killer(chance, expected.usual_s, kills, RANKS)
    with Job([options], training) as job:
        for line in job.lines():
            killer.hear(line)
        assert job.agents[0].wait() == 0, f"{killer.victims} were killed\n{job.report()}"
        judge_that_nothing_is_left(job)
    try:
        judge(job.said, expected, ranks=tuple(range(RANKS)))
    except AssertionError as error:
        raise AssertionError(f"{error}\n{killer.victims} were killed\n{job.report()}") from error
    judge_what_lies_there(place, expected, 0.0)
    return killer


def test_a_rank_is_killed_and_torchrun_starts_it_again(
    expected: Expected, tmp_path: Path, scale: Scale, scorecard: Scorecard
) -> None:
    left = scale.runs(sample=1, full=100)
    while left > 0:
        place, kills = tmp_path / f"run_{left}", min(left, KILLS)
        try:
            killer = a_job_with_kills(place, expected, random.Random(left), kills)
        except HungError:
            scorecard.add("torchrun, a rank killed", runs=kills, hangs=1)
            raise
        for phase in killer.phases():
            scorecard.add(f"torchrun, a rank killed in {phase}", runs=1)
        shutil.rmtree(place)
        left -= kills


def two_nodes(port: int) -> list[list[str]]:
    """Options of two agents of one rank each, who go on alone if need be. Neither hosts the place where they meet."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "kills"]
    patience = "is_host=0,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
    here = ["--local-addr", "127.0.0.1", "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"]
    return [[*meeting, "--rdzv-conf", patience, *here]] * 2


def a_job_that_loses_a_node(place: Path, expected: Expected, chance: random.Random) -> Killer:
    shutil.copytree(expected.run, place)
    training = Training(str(place), LAST, LOST, process=chance.random() < 0.5, kills=1, ranks=RANKS)
    killer = Killer(chance, expected.usual_s, 1, RANKS, whole_node=True)
    # Not libuv's server, which leaves a pipe open in this process for ever.
    meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False)
    with Job(two_nodes(meeting.port), training) as job:
        for line in job.lines():
            killer.hear(line)
        statuses = sorted(agent.wait() for agent in job.agents)
        judge_that_nothing_is_left(job)
    try:
        assert statuses == [-signal.SIGKILL, 0]
        judge(job.said, expected, ranks=(0,), close=1e-9)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{killer.victims} was killed\n{job.report()}") from error
    judge_what_lies_there(place, expected, 1e-9)
    return killer


@pytest.mark.larger
def test_a_node_is_gone_and_the_other_goes_on_alone(
    expected: Expected, tmp_path: Path, scale: Scale, scorecard: Scorecard
) -> None:
    for number in range(scale.runs(sample=1, full=30)):
        killer = a_job_that_loses_a_node(tmp_path / str(number), expected, random.Random(number))
        (phase,) = killer.phases()
        scorecard.add("torchrun, one node of two killed", runs=1, notes=f"in {phase}")


def test_what_went_wrong_is_found() -> None:
    """By who judges what the ranks have said."""

    def line(word: str, step: int, value: str = "") -> Line:
        return Line(word, rank=0, pid=1, step=step, life=0, at_s=0.0, value=value)

    def losses(*steps: int) -> list[Line]:
        return [line("loss", step, expected.losses[step].hex()) for step in steps]

    expected = Expected(Path(), {step: 1.0 / step for step in range(1, 9)}, 2.5)
    begun, end = [line("resumed", 3), *losses(4, 5), line("told", 5)], [line("ended", 8, (2.5).hex())]
    judge([*begun, line("resumed", 5), *losses(6, 7, 8), *end], expected, ranks=(0,))
    with pytest.raises(AssertionError, match="step 5 was promised"):
        judge([*begun, line("resumed", 4), *losses(5, 6, 7, 8), *end], expected, ranks=(0,))
    with pytest.raises(AssertionError, match="step 3 was promised"):
        judge([line("resumed", 2), *losses(3, 4), *end], expected, ranks=(0,))
    with pytest.raises(AssertionError, match="loss"):
        judge([*begun, line("loss", 6, (0.2).hex()), *end], expected, ranks=(0,))
    with pytest.raises(AssertionError, match="ended"):
        judge([*begun, line("ended", 8, (2.4).hex())], expected, ranks=(0,))
    with pytest.raises(AssertionError):
        judge(begun, expected, ranks=(0,))
