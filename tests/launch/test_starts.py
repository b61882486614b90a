"""What stands in the manifests runs: two pods, or two services of compose, as two torchruns of one rank each here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from tests.house.source import ROOT
from tests.launch.commands import IN_THE_IMAGE, Command, of_compose, of_kubernetes
from tests.launch.long import asked_for, committed, resumed_at, steps, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COMMANDS = {command.place: command for command in [*of_kubernetes(), *of_compose()]}
HERE = {"--nproc-per-node": "1", "--rdzv-endpoint": "", "--rdzv-conf": "join_timeout=300,last_call_timeout=5"}


def here(command: Command, root: Path, last_step: int, port: int) -> list[str]:
    """The same for this machine: where they meet, where the program lies and where checkpoints go is changed."""
    places = {**HERE, "--rdzv-endpoint": f"127.0.0.1:{port}"}
    options = dict(word.split("=", 1) for word in command.words[1:-3])
    words = [f"{name}={places.get(name, value)}" for name, value in options.items()]
    program = command.words[-3].replace(IN_THE_IMAGE, str(ROOT))
    return [sys.executable, "-m", "torch.distributed.run", *words, program, str(root), str(last_step)]


def start(command: Command, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **command.environment, "PYTHONPATH": str(ROOT)}
    with log.open("ab") as output:
        return subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def run_both(command: Command, folder: Path, last_step: int, port: int) -> str:
    """What both print."""
    words, log = here(command, folder / "run", last_step, port), folder / f"log_{last_step}"
    with ExitStack() as stack:
        both = [stack.enter_context(start(command, words, log)) for _ in range(2)]
        stack.callback(lambda: [each.kill() for each in both])
        assert [each.wait(300) for each in both] == [0, 0], log.read_text()
    return log.read_text()


def test_a_job_set_trains(tmp_path: Path, free_port: int) -> None:
    assert steps(run_both(COMMANDS["jobset.yaml"], tmp_path, 40, free_port)) == [20, 40]
    assert committed(tmp_path / "run") == [20, 40]


@asked_for
@pytest.mark.parametrize("place", COMMANDS)
def test_what_stands_in_the_manifests_trains_and_goes_on(tmp_path: Path, free_port: int, place: str) -> None:
    assert steps(run_both(COMMANDS[place], tmp_path, 40, free_port)) == [20, 40]
    assert resumed_at(run_both(COMMANDS[place], tmp_path, 80, free_port)) == [40]


@asked_for
def test_a_pod_that_is_evicted_is_waited_for(tmp_path: Path, free_port: int) -> None:
    """SIGTERM to one torchrun: all stop at one step; the other one's ranks start again when there is a new one."""
    command, log = COMMANDS["jobset.yaml"], tmp_path / "log"
    words = here(command, tmp_path / "run", 10**7, free_port)
    with ExitStack() as stack:
        stays = stack.enter_context(start(command, words, log))
        stack.callback(stays.kill)
        wait_until(lambda: listens(free_port), "the meeting place is open", log)
        goes = stack.enter_context(start(command, words, log))
        stack.callback(goes.kill)
        wait_until(lambda: len(committed(tmp_path / "run")) >= 2, "it trains", log)
        goes.send_signal(signal.SIGTERM)
        assert goes.wait(120) == 1
        last = committed(tmp_path / "run")[-1]
        new = stack.enter_context(start(command, words, log))
        stack.callback(new.kill)
        wait_until(lambda: resumed_at(log.read_text()), "it goes on", log)
        assert resumed_at(log.read_text()) == [last]
        stays.send_signal(signal.SIGTERM)
        new.send_signal(signal.SIGTERM)
        assert [stays.wait(120), new.wait(120)] == [1, 1]


@asked_for
def test_elastic_a_node_is_lost_and_another_one_comes(tmp_path: Path) -> None:
    """By the starter, with a meeting place that is no node's: goes on alone, then with the new one."""
    log, root = tmp_path / "log", tmp_path / "run"
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"NODES": "1:2", "RANKS": "1", "LAST_CALL": "5", "MEET_ELSEWHERE": "yes", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": beside, **settings}
    place = [sys.executable, str(ROOT / "launch/torchrun/meeting.py"), "0"]
    with ExitStack() as stack:
        meeting = stack.enter_context(subprocess.Popen(place, stdout=subprocess.PIPE, text=True))
        stack.callback(meeting.terminate)
        assert meeting.stdout is not None
        port = meeting.stdout.readline().split()[-1]
        words = ["bash", str(ROOT / "launch/torchrun/elastic.sh"), f"127.0.0.1:{port}", str(root), str(10**7)]

        def node() -> subprocess.Popen[bytes]:
            with log.open("ab") as output:
                started = subprocess.Popen(words, env=environment, stdout=output, stderr=output)
            stack.callback(lambda: lose(started))
            return started

        def ranks() -> int:
            """Of the newest step."""
            steps_there = committed(root)
            return len(list((root / f"step_{steps_there[-1]}").glob("rank_*.pt"))) if steps_there else 0

        def lose(started: subprocess.Popen[bytes]) -> None:
            with suppress(psutil.NoSuchProcess):
                torchrun = psutil.Process(started.pid)
                for process in [torchrun, *torchrun.children(recursive=True)]:
                    process.kill()
            started.wait()

        lost, _ = node(), node()
        wait_until(lambda: ranks() == 2, "two nodes train", log)
        lose(lost)
        wait_until(lambda: ranks() == 1, "one goes on alone", log)
        node()
        wait_until(lambda: ranks() == 2, "a new one is taken in", log)
        assert len(resumed_at(log.read_text())) >= 2
