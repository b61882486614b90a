"""A training of two nodes is never left in peace: every few seconds a rank, a node or the storage server is killed.

    python -m tests.kills.soak --minutes 20              torchrun, two agents, elastic; SeaweedFS
    python -m tests.kills.soak --minutes 1 --seed 7      what is killed, and when, follows from the seed

A rank is killed alone: torchrun starts both anew. A node is an agent with its rank: the other goes on alone, and is
joined again when the node is back, a few seconds later. The storage server is killed and comes back with what it has.
Meanwhile another process would look at the catalog; a thread here does. At the end the training is left alone for one
step, and all that its ranks have said is compared with an undisturbed training. Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
import torch
import torch.distributed as dist

import shardckpt as sc
from shardckpt.testing.pool import ProcessPool
from shardckpt.testing.servers import seaweed
from tests.kills import enduring
from tests.kills.agents import marked, start_agent
from tests.kills.elastic import Line
from tests.kills.enduring import Enduring
from tests.kills.truth import Judge, Notes, Truth, Watcher

NODES = 2
RANK, NODE, SERVER = KINDS = "a rank", "a node", "the storage server"
_POLL_S = 0.02
_DOING = {"resumed": "load", "loss": "train", "told": "train", "failed": "train"}
"""What a rank does that has said this last, where it is not what it said."""


class Nodes(Protocol):
    """Where the ranks run, one on each node."""

    given_up: int
    """Agents that have ended by themselves before the training did, and were started again."""

    def tend(self) -> None:
        """Start what has ended, or is due to come back."""
        ...

    def pids(self) -> set[int]:
        """The processes that are theirs now: the number of one that has ended may be anybody's."""
        ...

    def lose(self, pid: int, *, back_after_s: float) -> None:
        """Kill the node of that rank."""
        ...

    def ended_well(self) -> bool:
        """Whether the training has come to its end by itself."""
        ...

    def close(self) -> None: ...


class Torchrun:
    """Agents of torchrun; one that has ended is started again, as a scheduler would."""

    def __init__(self, work: Enduring, place: Path) -> None:
        # Not libuv's server, which leaves a pipe open in this process for ever.
        self._meeting = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False)
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{self._meeting.port}", "--rdzv-id", "soak"]
        # A machine that is busy must not look like a node that is gone: two would go on, each alone.
        patience = "is_host=0,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=6"
        here = ["--local-addr", "127.0.0.1", "--nnodes", f"1:{NODES}", "--nproc-per-node", "1"]
        restarts = ["--max-restarts", "1000000"]
        program = str(Path(enduring.__file__))
        self._program = [*meeting, "--rdzv-conf", patience, *here, *restarts, program, work.text()]
        self._mark, self._place = uuid.uuid4().hex, place
        self._agents: list[subprocess.Popen[str] | None] = [None] * NODES
        self._due = [0.0] * NODES
        self.given_up = 0

    def tend(self) -> None:
        for node, agent in enumerate(self._agents):
            if agent is not None and agent.poll() not in (None, 0):
                self.given_up += agent.poll() != -signal.SIGKILL
                self._agents[node] = None
                self._due[node] = max(self._due[node], time.monotonic() + 1.0)
            if self._agents[node] is None and time.monotonic() >= self._due[node]:
                with (self._place / f"node_{node}.log").open("a") as log:
                    self._agents[node] = start_agent(self._program, mark=self._mark, output=log)

    def pids(self) -> set[int]:
        found = set[int]()
        for agent in self._agents:
            with suppress(psutil.NoSuchProcess):
                if agent is not None and agent.poll() is None:
                    found |= {child.pid for child in psutil.Process(agent.pid).children(recursive=True)}
        return found

    def lose(self, pid: int, *, back_after_s: float) -> None:
        above = psutil.Process(pid).ppid()
        node = next((node for node, it in enumerate(self._agents) if it is not None and it.pid == above), None)
        if node is None:  # its agent has ended this very moment
            os.kill(pid, signal.SIGKILL)
            return
        # With all that is on it: the agent may just have started another worker.
        for each in (above, *(child.pid for child in psutil.Process(above).children(recursive=True))):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self._due[node] = time.monotonic() + back_after_s

    def ended_well(self) -> bool:
        return all(agent is not None and agent.poll() == 0 for agent in self._agents)

    def close(self) -> None:
        for agent in self._agents:
            if agent is not None:
                agent.kill()
                agent.wait()
        for pid in marked(self._mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Pool:
    """Ranks of a warm pool, which start at once; each life in a thread, the next one when it is over."""

    def __init__(self, work: Enduring, pool: ProcessPool) -> None:
        self._work, self._pool = work, pool
        self._life: threading.Thread | None = None
        self._good = False
        self._back_at = 0.0
        self._size = NODES
        self.given_up = 0

    def tend(self) -> None:
        if self._size < NODES and time.monotonic() >= self._back_at and self._life is not None:
            for pid in self.pids():  # as torchrun does when a node joins
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._size = NODES
        if not self._good and (self._life is None or not self._life.is_alive()):
            self._life = threading.Thread(target=self._live, name="life")
            self._life.start()

    def _live(self) -> None:
        outcomes = self._pool.run_settled(self._size, enduring.in_pool, self._work, timeout=600.0)
        self._good = all(outcome.error is None for outcome in outcomes)

    def pids(self) -> set[int]:
        workers = list(self._pool._workers.values())
        return {worker.process.pid for worker in workers if worker.process.pid is not None}

    def lose(self, pid: int, *, back_after_s: float) -> None:
        os.kill(pid, signal.SIGKILL)
        self._size, self._back_at = NODES - 1, time.monotonic() + back_after_s

    def ended_well(self) -> bool:
        return self._good and self._life is not None and not self._life.is_alive()

    def close(self) -> None:
        while self._life is not None and self._life.is_alive():
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._life.join(0.2)


@dataclass
class Soak:
    """One run of it. On the main thread: the server dies with the thread that has started it."""

    nodes: Nodes
    server: seaweed.MortalServer
    notes: Notes
    judge: Judge
    chance: random.Random
    pause_s: tuple[float, float]
    """Between two kills, at least and at most."""
    kills: Counter[str] = field(default_factory=Counter)
    doing: Counter[str] = field(default_factory=Counter)
    """What killed ranks were doing."""

    def go_on(self, seconds: float) -> None:
        """Kill one thing after the other, for so long from the first step on; each kind once at least."""
        while not self.judge.furthest:
            self.attend()
        end, first = time.monotonic() + seconds, self.chance.sample(KINDS, len(KINDS))
        while True:
            due = time.monotonic() + self.chance.uniform(*self.pause_s)
            what = next((kind for kind in first if not self.kills[kind]), self.chance.choice((RANK, *KINDS)))
            away_s = self.chance.uniform(0.0, self.pause_s[1] / 2)
            while time.monotonic() < due:
                if time.monotonic() > end and len(self.kills) == len(KINDS):
                    return
                self.attend()
            self._kill(what, away_s)

    def attend(self) -> None:
        self.nodes.tend()
        for line in self.notes.new():
            self.judge.hear(line)
        time.sleep(_POLL_S)

    def _kill(self, what: str, away_s: float) -> None:
        if what == SERVER:
            self.server.kill()
            back_at = time.monotonic() + away_s
            while time.monotonic() < back_at:
                self.attend()
            self.server.start()
            self.kills[what] += 1
            return
        living = self._living()
        if not living:
            return
        victim = self.chance.choice(sorted(living, key=lambda line: (line.rank, line.pid)))
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if what == RANK:
                os.kill(victim.pid, signal.SIGKILL)
            else:
                self.nodes.lose(victim.pid, back_after_s=away_s)
            self.kills[what] += 1
            self.doing[_DOING.get(victim.word, victim.word)] += 1

    def _living(self) -> list[Line]:
        """What they have said last."""
        own = self.nodes.pids()
        return [line for pid, line in self.judge.last.items() if pid in own and line.word != "ended" and _lives(pid)]

    def _training(self) -> list[Line]:
        return [line for line in self._living() if line.step >= self.judge.furthest - 1]

    def come_to_an_end(self, until: Path, within_s: float) -> None:
        """Leave it alone; when all nodes train again, tell it to end."""
        end = time.monotonic() + within_s
        while not self.nodes.ended_well():
            if not until.exists() and len(self._training()) == NODES:
                until.touch()
            if time.monotonic() > end:
                self.judge.wrong.append(f"the training had not ended {within_s:g} s after it was told to")
                return
            self.attend()
        self.attend()
        if len({line.step for line in self.judge.ended.values()}) != 1:
            self.judge.wrong.append(f"the ranks ended apart: {self.judge.ended}")


def _lives(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@dataclass(frozen=True)
class Report:
    """What came of it."""

    seed: int
    seconds: float
    kills: Counter[str]
    doing: Counter[str]
    words: Counter[str]
    steps: int
    watcher: Watcher
    gap_s: float
    given_up: int
    wrong: list[str]

    def __str__(self) -> str:
        words, watcher = self.words, self.watcher
        listed = ", ".join(f"{what} {count}" for what, count in sorted(self.kills.items()))
        doing = ", ".join(f"{what} {count}" for what, count in self.doing.most_common())
        lines = [
            f"seed {self.seed}, {self.seconds / 60:.1f} minutes, {self.steps} steps trained",
            f"{self.kills.total()} kills: {listed}; the ranks were at: {doing}",
            f"{words['load']} lives of ranks begun, {words['resumed']} resumed, the longest time without a new step "
            f"{self.gap_s:.1f} s, {self.given_up} agents that gave up by themselves",
            f"{words['save']} saves by a rank: {words['told']} told to be committed, {words['failed']} to have failed",
            f"{words['loss']} losses compared; {watcher.looks} looks at the catalog, {watcher.loads} steps loaded and "
            f"compared, {watcher.unanswered} looks into a storage that was down",
            f"wrong: {len(self.wrong)}",
        ]
        return "\n".join([*lines, *(f"  {wrong}" for wrong in self.wrong[:20])])


@contextmanager
def nodes_of(work: Enduring, place: Path, pool: ProcessPool | None) -> Iterator[Nodes]:
    nodes: Nodes = Torchrun(work, place) if pool is None else Pool(work, pool)
    try:
        yield nodes
    finally:
        nodes.close()


def soak(
    place: Path, *, seconds: float, seed: int, pause_s: tuple[float, float], pool: ProcessPool | None = None
) -> Report:
    """Run it; `pool`: on ranks of that, instead of torchrun. Called in the main thread."""
    torch.set_num_threads(1)
    judge = Judge(Truth())
    with seaweed.mortal() as server:
        root, options = f"{server.server.url}/run", dict(server.server.options)
        work = Enduring(root, str(place / "notes"), str(place / "until"), options)
        began, watcher = time.monotonic(), Watcher(root, options, judge, every_s=min(2.0, pause_s[1] / 2))
        with nodes_of(work, place, pool) as nodes:
            run = Soak(nodes, server, Notes(place / "notes"), judge, random.Random(seed), pause_s)
            with watcher:
                run.go_on(seconds)
                run.come_to_an_end(place / "until", within_s=300)
        judge_the_end(root, options, judge, watcher)
    return Report(
        seed, time.monotonic() - began, run.kills, run.doing, judge.words, judge.furthest, watcher, judge.gap_s,
        nodes.given_up, judge.wrong,
    )  # fmt: skip


def judge_the_end(root: str, options: dict[str, str], judge: Judge, watcher: Watcher) -> None:
    """What lies there when all is over."""
    last = {line.step for line in judge.ended.values()}
    newest = watcher.look()
    if last != {newest}:
        judge.wrong.append(f"the last step is {sorted(last)}, and the newest in the root {newest}")
    if not sc.verify(root, storage_options=options).ok:
        judge.wrong.append("verify finds something wrong")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--pause", type=float, nargs=2, default=(2.0, 20.0), metavar="S", help="between two kills")
    parser.add_argument("--pool", action="store_true", help="ranks of a warm pool instead of torchrun: more kills")
    parser.add_argument("--keep", type=Path, help="a folder for the logs of the nodes and what the ranks have said")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="shardckpt-soak-") as folder:
        place = given.keep or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        how = {"seconds": 60 * given.minutes, "seed": given.seed, "pause_s": tuple(given.pause)}
        if given.pool:
            with ProcessPool() as pool:
                report = soak(place, **how, pool=pool)
        else:
            report = soak(place, **how)
    print(report)
    return bool(report.wrong)


if __name__ == "__main__":
    sys.exit(main())
