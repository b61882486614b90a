"""A training on two nodes of this machine, told step by step: network namespaces with a link between them, torchrun on
each. `bash launch/nodes.sh` runs it, as root; so does `test_two_nodes.py`.

    whole      both train and save; the link is slow
    cut        the link is cut in the middle of a save: both fail in time, each names the other, an older step is there
    fewer      one node goes on alone
    lost       both again, joined by name; one is killed, the other goes on alone, and comes to the end
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

import shardckpt as sc
from shardckpt.testing.gangs import run_ranks
from tests.faults.nodes import Nodes, NoNodesError, two_nodes
from tests.kills.agents import Job
from tests.kills.elastic import Line, Training, saying, train

PATIENCE_S = 5.0
"""How long the ranks wait for each other."""
LATE_S = 4.0
"""How much later than that the last of them may have said how it went: the others wait a little longer than rank 0, and
the machine may be busy."""
WHOLE, CUT, FEWER, LAST = 3, 6, 8, 12
"""The steps at which the acts end, or what is meant to happen does."""
PORT = 29400
"""Of the first node, where nothing else is."""


class WrongError(AssertionError):
    """Something that should be so is not."""


@dataclass
class Play:
    nodes: Nodes
    root: Path
    tell: Callable[[str], object] = print
    losses: dict[int, float] = field(default_factory=dict)
    """Of a training that nobody disturbs."""
    promised: int = 0

    def __post_init__(self) -> None:
        lines: list[Line] = []
        with tempfile.TemporaryDirectory() as folder:
            run_ranks(1, lambda gangs: train(Training(folder, LAST), gangs, saying(0, lines.append)))
        self.losses = {line.step: float.fromhex(line.value) for line in lines if line.word == "loss"}

    def all_acts(self) -> None:
        self.whole()
        self.cut()
        self.fewer()
        self.lost()

    def whole(self) -> None:
        self.nodes.slow_down(kbit=2000)
        job = self._job(2, WHOLE)
        self._run(job, lambda line: None)
        self._check(job, resumed=0, ended=WHOLE)
        self.tell(f"whole: two nodes, a link of 2 Mbit/s, steps {self._steps()} are there")

    def cut(self) -> None:
        """In the middle of a save of the second node: it has said that it saves, and writes or waits for the first."""
        before, job = self.promised, self._job(2, LAST)
        at: list[float] = []

        def cut(line: Line) -> None:
            if (line.word, line.step, line.rank) == ("save", CUT, 1) and not at:
                self.nodes.cut()
                at.append(time.monotonic())

        took = self._run(job, cut, until_silent=at)
        self.nodes.mend()
        self._check(job, resumed=before, ended=None)
        errors = self._errors(job)
        for own, other in ((0, 1), (1, 0)):
            named = [text for rank, text in errors if rank == own and f"rank {other}" in text]
            need(bool(named), f"rank {own} names rank {other}: {errors}")
        need(took < PATIENCE_S + LATE_S, f"in time: it took {took:.1f} s")
        steps = self._steps()
        need(steps[-1] >= CUT - 1, f"what was saved before is there: {steps}")
        self.tell(f"cut: both had raised {took:.1f} s after the cut (deadline {PATIENCE_S:g} s), naming each other; "
                  f"steps {steps} are there, {steps[-1]} was promised before")  # fmt: skip

    def fewer(self) -> None:
        newest, job = self._steps()[-1], self._job(1, FEWER)
        self._run(job, lambda line: None)
        self._check(job, resumed=newest, ended=FEWER)
        self.tell(f"fewer: one node resumed from step {newest} and went on to {FEWER}")

    def lost(self) -> None:
        job, killed = self._job(2, LAST, least=1, kills=1), list[int]()

        def kill(line: Line) -> None:
            if (line.word, line.step, line.rank) == ("train", FEWER + 2, 1) and not killed:
                killed.append(line.pid)
                for pid in (psutil.Process(line.pid).ppid(), line.pid):
                    os.kill(pid, signal.SIGKILL)

        self._run(job, kill)
        self._check(job, resumed=FEWER, ended=LAST)
        last = [line.step for line in job.said if line.word == "resumed"][-1]
        self.tell(f"lost: one node killed in step {FEWER + 2}; the other resumed from {last} alone, and came to {LAST}")
        need(sc.verify(self.root).ok, "all that is there is whole")

    def _job(self, count: int, last: int, *, least: int | None = None, kills: int = 0) -> Job:
        """torchrun on so many nodes, joined by the first one's name; it goes on with `least`."""
        names = ["--rdzv-endpoint", f"{self.nodes.name(0)}:{PORT}", "--rdzv-backend", "c10d", "--rdzv-id", f"to {last}"]
        patience = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,is_host="
        options = []
        for node in range(count):
            here = ["--local-addr", self.nodes.address(node), "--rdzv-conf", f"{patience}{int(node == 0)}"]
            size = ["--nnodes", f"{least or count}:{count}", "--nproc-per-node", "1"]
            options.append([*names, *here, *size, "--max-restarts", str(3 * kills)])
        ranks = count if least else 1
        training = Training(str(self.root), last, kills=kills, ranks=ranks, patience_s=PATIENCE_S)
        return Job(options, training, at=[self.nodes.at(node) for node in range(count)])

    def _run(self, job: Job, hear: Callable[[Line], None], *, until_silent: list[float] | None = None) -> float:
        """Until it has ended; or, when the link is cut, until both ranks have raised, for then agents cannot end by
        themselves. Gives the seconds from the cut to that."""
        with job:
            for line in job.lines(
                until=lambda: bool(until_silent) and {rank for rank, _ in self._errors(job)} == {0, 1}
            ):
                hear(line)
                if line.word == "told":
                    self.promised = max(self.promised, line.step)
            return time.monotonic() - until_silent[0] if until_silent else 0.0

    def _errors(self, job: Job) -> list[tuple[int, str]]:
        """The last line of the traceback of each rank, as torchrun prints it: "[rank1]: ...Error: ..."."""
        found = [re.match(r"\[rank(\d+)\]:\s*(\S*shardckpt\S*Error: .*)", text) for text in job.other]
        return [(int(match[1]), match[2]) for match in found if match]

    def _check(self, job: Job, *, resumed: int, ended: int | None) -> None:
        first = [line.step for line in job.said if line.word == "resumed"][:1]
        need(first == [resumed], f"it goes on from step {resumed}, not {first}: {job.report()}")
        for line in job.said:
            if line.word == "loss":
                near = abs(float.fromhex(line.value) - self.losses[line.step]) <= 1e-9 * abs(self.losses[line.step])
                need(near, f"the loss of step {line.step} is that of the undisturbed training")
        last = {line.step for line in job.said if line.word == "ended"}
        need(last == ({ended} if ended else set()), f"it ends with step {ended}, not {last}: {job.report()}")

    def _steps(self) -> list[int]:
        with sc.CheckpointManager(self.root, sc.Gangs.local()) as checkpoints:
            steps = checkpoints.steps()
        need(max(steps, default=0) >= self.promised, f"step {self.promised} was promised, and there are {steps}")
        return steps


def need(holds: bool, what: str) -> None:
    if not holds:
        raise WrongError(what)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--ipv6", action="store_true", help="the nodes speak no IPv4")
    given = parser.parse_args()
    torch.set_num_threads(1)
    try:
        with two_nodes(ipv6=given.ipv6) as nodes, tempfile.TemporaryDirectory(prefix="shardckpt-nodes-") as folder:
            Play(nodes, Path(folder) / "run", lambda text: print(text, flush=True)).all_acts()
    except NoNodesError as error:
        print(f"no network namespaces here (root is needed, iproute2 and util-linux): {error}", file=sys.stderr)
        return 2
    except WrongError as error:
        print(f"WRONG: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
