"""Ranks that are killed, or stopped and woken by the next job, at random moments: nothing that was promised is lost.

`-s` shows how long the others took to tell that a rank had been killed.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shardckpt.testing.gang_acts import await_marks
from shardckpt.testing.pool import Outcome, ProcessPool, RankLostError
from tests.kills.lives import RANKS, Life, live
from tests.scorecard import Scale, Scorecard

pytestmark = [pytest.mark.crash]

PATIENCE_S = 10.0
"""The timeout of the managers; a kill is noticed long before."""
CALL_S = 60.0
RIVAL = "the step was saved by somebody else in the meantime"


@dataclass
class Run:
    """Lives of one job after each other, on one root."""

    place: Path
    random: random.Random
    lives: int = 0
    usual_s: float = 0.3
    """How long a life takes that nobody ends."""
    noticed_s: list[float] = field(default_factory=list)
    kills: int = 0
    hasty: bool = False

    def next_life(self, timeout_s: float = PATIENCE_S, *, haunted: bool = False) -> Life:
        self.lives += 1
        return Life(self.lives, self.place / "run", self.place / "notes", timeout_s, self.hasty, haunted).prepare()


def strike(
    life: Life, victims: list[int], number: int, delay_s: float, *, during: Life | None = None
) -> Callable[[], dict[int, float]]:
    """Send ranks of a life a signal, some time after all ranks of that life (or of `during`) have begun; gives a
    function that waits for that, and tells when which was struck."""
    struck: dict[int, float] = {}

    def act() -> None:
        with suppress(TimeoutError):
            await_marks((during or life).marks, "pid", RANKS)
            if life.hasty:  # as soon as it believes that something is committed
                await_promise(life, victims[0])
            threading.Event().wait(delay_s)
            for victim in victims:
                with suppress(ProcessLookupError):
                    if not (life.marks / f"ended_{victim}").exists():
                        os.kill(int((life.marks / f"pid_{victim}").read_text()), number)
                        struck[victim] = time.monotonic()

    thread = threading.Thread(target=act, name="striker")
    thread.start()

    def wait() -> dict[int, float]:
        thread.join()
        return struck

    return wait


def await_promise(life: Life, rank: int) -> None:
    told, deadline = life.notes / f"told_{life.number}_{rank}", time.monotonic() + PATIENCE_S
    while not (told.exists() and told.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.001)


def judge(outcomes: list[Outcome], struck: dict[int, float], *, hurried: bool = False) -> list[float]:
    """Nobody hangs, nobody sees a torn or a lost step; those who fail name one that was struck. How long they took.

    `hurried`: the others may be told nothing before their own deadline, which is a second, and then name rank 0, which
    waited for the one that was struck (2026-11-27: one of 20 to 100 lives, about the moment in which links are made).
    """
    took = []
    for outcome in outcomes:
        if outcome.rank in struck and isinstance(outcome.error, RankLostError):
            continue
        assert outcome.error is None, str(outcome)
        seen = outcome.value
        if seen["error"] is not None:
            assert struck, f"rank {outcome.rank} failed although nothing had happened: {seen['error']}"
            # One that is stopped while ranks connect is known to rank 0 alone; the others then say that 0 was late.
            blamed = {*struck, 0} if hurried or "connecting" in seen["error"] else set(struck)
            assert outcome.rank in struck or named(seen["error"]) & blamed, seen
            took.append(seen["at_s"] - min(struck.values()))
    return took


def was_too_late(outcome: Outcome) -> bool:
    """Whether one that woke up committed that step just before: then the save fails, says so, and nothing is lost."""
    return outcome.error is None and RIVAL in (outcome.value["error"] or "")


def named(text: str) -> set[int]:
    """The ranks that an error speaks of: "rank 3", "ranks 0-2, 7"."""
    spans = [span.split("-") for listed in re.findall(r"ranks? ([\d, -]*\d)", text) for span in listed.split(", ")]
    return {rank for span in spans for rank in range(int(span[0]), int(span[-1]) + 1)}


def a_whole_life(run: Run, ranks: ProcessPool) -> None:
    """Nobody disturbs it: it finds what was promised, and saves on."""
    outcomes = ranks.run_settled(RANKS, live, run.next_life(), timeout=CALL_S)
    judge(outcomes, {})
    found = [outcome.value["found"] for outcome in outcomes]
    assert found[1:] == found[:-1], "the ranks see different things"
    run.usual_s = outcomes[0].value["took_s"]


def a_life_that_is_cut_short(run: Run, ranks: ProcessPool) -> None:
    life = run.next_life()
    victims = run.random.sample(range(RANKS), run.random.choice([1, 1, 1, 2, 3]))
    wait = strike(life, victims, signal.SIGKILL, 0.0 if run.hasty else run.random.uniform(0, run.usual_s))
    outcomes = ranks.run_settled(RANKS, live, life, timeout=CALL_S)
    struck = wait()
    run.noticed_s += judge(outcomes, struck)
    run.kills += bool(struck)
    if not struck:  # it was over before: the first life, whose processes are new, takes several times as long
        run.usual_s = outcomes[0].value["took_s"]


def some_lives(place: Path, ranks: ProcessPool, kills: int, *, hasty: bool = False) -> list[float]:
    """So many kills, and then a life that nobody cuts short; a new root now and then. How long the others took."""
    noticed = []
    while kills > 0:
        run = Run(place / f"from_{kills}", random.Random(kills), hasty=hasty)
        a_whole_life(run, ranks)
        while run.kills < min(kills, 20):
            a_life_that_is_cut_short(run, ranks)
        a_whole_life(run, ranks)
        kills -= run.kills
        noticed += run.noticed_s
    return sorted(noticed)


def report(noticed: list[float]) -> str:
    late = sum(took > 2 for took in noticed)
    usually, longest = f"{noticed[len(noticed) // 2]:.2f} s (median)", f"{noticed[-1]:.1f} s at most"
    return f"the others raised after {usually}, {longest}, {late} of {len(noticed)} after more than 2 s"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ranks_are_killed_and_the_job_is_started_again(
    ranks: ProcessPool, tmp_path: Path, scale: Scale, scorecard: Scorecard
) -> None:
    kills = scale.runs(sample=20, full=1000)
    noticed = some_lives(tmp_path, ranks, kills)
    scorecard.add("SIGKILL of random ranks, then resume", runs=kills, notes=report(noticed))
    assert noticed[-1] < 1.5 * PATIENCE_S + 2


def test_a_promise_that_is_made_too_early_is_found(ranks: ProcessPool, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="was promised"):
        some_lives(tmp_path, ranks, 20, hasty=True)


def a_life_whose_rank_wakes_up_in_the_next(run: Run, ranks: ProcessPool, others: ProcessPool) -> None:
    """One is stopped; the others give up; a new job does the same steps, and meanwhile or afterwards it goes on."""
    first, second = run.next_life(timeout_s=1.0), run.next_life(haunted=True)
    victim = run.random.randrange(RANKS)
    wait = strike(first, [victim], signal.SIGSTOP, run.random.uniform(0, run.usual_s))
    outcomes: list[Outcome] = []
    job = threading.Thread(
        target=lambda: outcomes.extend(ranks.run_settled(RANKS, live, first, timeout=CALL_S)), name="first job"
    )
    job.start()
    try:
        struck = wait()
        await_marks(first.marks, "ended", RANKS - len(struck))
        wake = strike(first, [victim], signal.SIGCONT, run.random.uniform(0, 1.5 * run.usual_s), during=second)
        found = others.run_settled(RANKS, live, second, timeout=CALL_S)
        wake()
    finally:
        for rank in range(RANKS):
            with suppress(ProcessLookupError, FileNotFoundError):
                os.kill(int((first.marks / f"pid_{rank}").read_text()), signal.SIGCONT)
        job.join()
    judge([outcome for outcome in found if not was_too_late(outcome)], {})
    judge(outcomes, struck, hurried=True)
    run.kills += bool(struck)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ranks_wake_up_in_the_next_job(ranks: ProcessPool, tmp_path: Path, scale: Scale, scorecard: Scorecard) -> None:
    zombies = scale.runs(sample=5, full=200)
    with ProcessPool() as others:
        while zombies > 0:
            run = Run(tmp_path / f"from_{zombies}", random.Random(zombies))
            a_whole_life(run, others)
            while run.kills < min(zombies, 10):
                a_life_whose_rank_wakes_up_in_the_next(run, ranks, others)
                a_whole_life(run, others)
            zombies -= run.kills
            scorecard.add("SIGSTOP of random ranks that wake in the next job", runs=run.kills)
