"""torchrun's agents, one per node, on this machine: what their workers say is read, and a rank or a node is killed.

Everything that such a job starts carries its mark in the environment, so that whatever is left of it is found, also
what no longer has a parent.
"""

from __future__ import annotations

import os
import random
import selectors
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import IO

import psutil

from tests.kills.elastic import Line, Training

REPOSITORY = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("elastic.py")
PHASES = ("repair", "load", "train", "save", "prune")
DEADLINE_S = 200.0
"""Of a job with all its restarts, on a machine that is busy."""
_MARK = "SHARDCKPT_TEST_JOB"


class HungError(AssertionError):
    """The job had not ended at its deadline."""


def start_agent(
    program: list[str], *, mark: str, output: int | IO[str], at: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """torchrun with these arguments; it and all that it starts carry the mark."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), _MARK: mark}
    # The agent's store is handed to restarted workers with what is in it (pytorch#135712); gloo then hangs.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = [*at, sys.executable, "-m", "torch.distributed.run", *program]
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environment)


def marked(mark: str) -> list[int]:
    """The processes that still carry the mark."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if f"{_MARK}={mark}".encode() in Path("/proc", name, "environ").read_bytes():
                found.append(int(name))
    return found


@dataclass
class Job:
    """Agents with the same options, and everything that their workers have said so far, in that order."""

    options: list[list[str]]
    """Of each agent."""
    training: Training
    at: list[list[str]] = field(default_factory=list)
    """What the commands of the agents begin with, where they run on nodes of their own."""
    said: list[Line] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    """What was printed besides."""
    agents: list[subprocess.Popen[str]] = field(default_factory=list)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    ended_by: str = ""

    def __enter__(self) -> Job:
        nothing: list[str] = []
        for options, at in zip_longest(self.options, self.at, fillvalue=nothing):
            program = [*options, str(PROGRAM), self.training.text()]
            self.agents.append(start_agent(program, mark=self.mark, output=subprocess.PIPE, at=at))
        self._watch = threading.Timer(DEADLINE_S, self._hangs, args=())
        self._watch.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Nothing of it is left, also if the test has failed."""
        self._watch.cancel()
        self._watch.join()
        self._end()
        for agent in self.agents:
            agent.wait()
            assert agent.stdout is not None
            agent.stdout.close()

    def _hangs(self) -> None:
        self.ended_by = "deadline"
        self._end()

    def _end(self) -> None:
        for agent in self.agents:
            agent.kill()
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def lines(self, *, until: Callable[[], bool] = lambda: False) -> Iterator[Line]:
        """What the workers say, as they say it, until all agents have ended, or so."""
        with selectors.DefaultSelector() as selector:
            for agent in self.agents:
                assert agent.stdout is not None
                os.set_blocking(agent.stdout.fileno(), False)
                selector.register(agent.stdout.fileno(), selectors.EVENT_READ, [b""])
            while selector.get_map() and not until():
                for key, _ in selector.select():
                    pieces = os.read(key.fd, 1 << 16)
                    if not pieces:
                        selector.unregister(key.fd)
                    *whole, key.data[0] = (key.data[0] + pieces).split(b"\n")
                    yield from self._heard(whole)
        if self.ended_by:
            raise HungError(f"after {DEADLINE_S:g} s it was still going on:\n{self.report()}")

    def _heard(self, texts: list[bytes]) -> Iterator[Line]:
        for text in texts:
            line = Line.parse(text.decode(errors="replace"))
            if line is None:
                self.other.append(text.decode(errors="replace"))
            else:
                self.said.append(line)
                yield line

    def left(self) -> list[int]:
        return marked(self.mark)

    def report(self) -> str:
        return "\n".join([*(line.text() for line in self.said), *self.other[-60:]])


@dataclass
class Killer:
    """Kills one random rank in each of the first lives of a job, at a random moment of a random phase."""

    chance: random.Random
    usual_s: dict[str, float]
    """How long a phase takes; what is seen to take longer is noted."""
    lives: int
    ranks: int
    whole_node: bool = False
    """Whether the agent above that rank is killed with it."""
    victims: list[int] = field(default_factory=list)
    """The processes that it has killed, one of each life."""
    _life: int = -1
    _last: dict[int, Line] = field(default_factory=dict)
    """By process, what it has said last."""
    _plan: tuple[int, str] = (0, "")
    """Rank and phase."""
    _left: int = 0
    """How often the rank may begin with that phase before it is killed."""

    def hear(self, line: Line) -> None:
        """Called with every line, at once."""
        before = self._last.get(line.pid)
        if before is not None:
            self.note(before, line)
        self._last[line.pid] = line
        if line.life > self._life:
            self._life = line.life
            self._choose(line.word)
        rank, phase = self._plan
        if line.rank != rank or len(self.victims) > line.life or line.life >= self.lives:
            return
        if line.word == "waits":  # a life that had fewer steps left than there were to be
            self._left = 1
        elif line.word != phase:
            return
        self._left -= 1
        if self._left == 0:
            time.sleep(self.chance.uniform(0.0, self.usual_s.get(line.word, 0.0)))
            agent = psutil.Process(line.pid).ppid()
            for pid in [agent, line.pid] if self.whole_node else [line.pid]:
                os.kill(pid, signal.SIGKILL)
            self.victims.append(line.pid)

    def note(self, before: Line, line: Line) -> None:
        self.usual_s[before.word] = max(self.usual_s.get(before.word, 0.0), line.at_s - before.at_s)

    def _choose(self, first: str) -> None:
        phase = self.chance.choice(PHASES if first == "repair" else PHASES[1:])
        self._plan = self.chance.randrange(self.ranks), phase
        self._left = 1 if phase in ("repair", "load") else self.chance.randint(1, 4)

    def phases(self) -> list[str]:
        """What the victims were doing, as far as they could say."""
        begun = {"resumed": "load", "loss": "train", "told": "save", "waits": "train"}
        return [begun.get(self._last[pid].word, self._last[pid].word) for pid in self.victims]
