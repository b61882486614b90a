"""The starters tell torchrun what it knows, start the one program there is, and set what elastic restarts need."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.house.source import ROOT
from tests.launch.commands import COMPOSE, IN_THE_IMAGE, KUBERNETES, Clone, Command, found, of_compose, of_kubernetes

NEEDED = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "45", "OMP_NUM_THREADS": "1"}
SHELL = {
    "one_node.sh": (["s3://b/run", "7"], {"RANKS": "2"}),
    "several_nodes.sh": (["node-a:29400", "s3://b/run", "7"], {"RANKS": "2", "NODES": "2"}),
    "elastic.sh": (["node-a:29400", "s3://b/run", "7"], {"RANKS": "2", "NODES": "1:2"}),
}
SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "node-[0-1]",
    "SLURM_NNODES": "2",
    "RANKS": "2",
}
RUNNING = "echo RUNNING\n"
REQUEUE_ENDS_IT = "[[ $1 != requeue ]] || kill $PPID\n[[ $1 != show ]] || printf 'node-0\\nnode-1\\n'\n"


def judge(command: Command) -> None:
    assert command.words[0] == "torchrun"
    given = get_args_parser().parse_args(command.words[1:])  # leaves the test by SystemExit if there is no such option
    program = given.training_script.replace(IN_THE_IMAGE, str(ROOT))
    assert Path(program).resolve() == ROOT / "launch/train.py"
    root, last_step = given.training_script_args
    assert "/" in root
    assert int(last_step) > 0
    assert given.standalone or (given.rdzv_backend == "c10d" and given.rdzv_endpoint and given.rdzv_id)
    assert given.max_restarts > 0
    assert {name: command.environment.get(name) for name in NEEDED} == NEEDED


@pytest.mark.parametrize("command", [*of_kubernetes(), *of_compose()], ids=lambda command: command.place)
def test_the_commands_of_containers_are_those_that_exist(command: Command) -> None:
    judge(command)


@pytest.mark.parametrize("name", SHELL)
def test_the_commands_of_shell_starters_are_those_that_exist(tmp_path: Path, name: str) -> None:
    clone = Clone.make(tmp_path / "a clone", {})
    words, environment = SHELL[name]
    status, output = clone.run(f"launch/torchrun/{name}", *words, **environment)
    assert status == 0, output
    words = [word.replace(str(clone.folder), str(ROOT)) for word in clone.noted("torchrun")]
    judge(Command(name, ("torchrun", *words), clone.environment()))


@pytest.mark.parametrize("name", SHELL)
def test_a_starter_that_lacks_something_says_what(tmp_path: Path, name: str) -> None:
    clone = Clone.make(tmp_path, {})
    words, _ = SHELL[name]
    status, output = clone.run(f"launch/torchrun/{name}", *words[:-1])
    assert status != 0
    assert "LAST_STEP is missing" in output
    if name != "one_node.sh":
        status, output = clone.run(f"launch/torchrun/{name}", *words)
        assert status != 0
        assert "how many nodes" in output
    assert clone.noted("torchrun") == []


def test_under_slurm_what_ends_well_is_not_started_again(tmp_path: Path) -> None:
    clone = Clone.make(tmp_path, {"srun": "exit 0\n", "scontrol": REQUEUE_ENDS_IT, "squeue": RUNNING})
    status, output = clone.run("launch/slurm/train.sbatch", "/runs/a", "7", SLURM_SUBMIT_DIR=str(tmp_path), **SLURM)
    assert status == 0, output
    option, *words = clone.noted("srun")
    assert option == "--kill-on-bad-exit"
    words = [str(ROOT / word) if word.startswith("launch/") else word for word in words]
    judge(Command("train.sbatch", tuple(words), clone.environment()))
    assert "--rdzv-endpoint\nnode-0:22345" in "\n".join(words)
    assert "requeue" not in clone.noted("scontrol")


@pytest.mark.parametrize(("run", "again"), [("0", True), ("19", True), ("20", False)])
def test_under_slurm_what_fails_goes_back_into_the_queue(tmp_path: Path, run: str, again: bool) -> None:
    clone = Clone.make(tmp_path, {"srun": "exit 1\n", "scontrol": REQUEUE_ENDS_IT, "squeue": RUNNING})
    status, output = clone.run(
        "launch/slurm/train.sbatch", "/runs/a", "7", SLURM_SUBMIT_DIR=str(tmp_path), SLURM_RESTART_COUNT=run, **SLURM
    )
    assert ("requeue" in clone.noted("scontrol")) == again
    assert f"run {run}: ended with status 1" in output
    assert again or status == 1


def test_under_slurm_what_no_restart_mends_is_given_up(tmp_path: Path) -> None:
    """train.py has put the error down; one of an earlier job of that number does not count."""
    for srun, again in (('echo "RootNotSharedError: two disks" >"$GIVEN_UP"; exit 1\n', False), ("exit 1\n", True)):
        folder = tmp_path / str(again)
        folder.mkdir()
        (folder / "train-12345.given-up").write_text("of old")
        clone = Clone.make(folder, {"srun": srun, "scontrol": REQUEUE_ENDS_IT, "squeue": RUNNING})
        status, output = clone.run(
            "launch/slurm/train.sbatch", "/runs/a", "7", SLURM_SUBMIT_DIR=str(folder), SLURM_JOB_NAME="train", **SLURM
        )
        assert ("requeue" in clone.noted("scontrol")) == again
        assert again or status == 1
        assert again or "job 12345 is given up: RootNotSharedError: two disks" in output


def test_under_slurm_what_was_cancelled_stays_so(tmp_path: Path) -> None:
    programs = {"srun": "exit 143\n", "scontrol": REQUEUE_ENDS_IT, "squeue": "echo COMPLETING\n"}
    clone = Clone.make(tmp_path, programs)
    status, _ = clone.run("launch/slurm/train.sbatch", "/runs/a", "7", SLURM_SUBMIT_DIR=str(tmp_path), **SLURM)
    assert status == 143
    assert "requeue" not in clone.noted("scontrol")


def test_under_slurm_a_signal_goes_to_the_ranks_which_are_waited_for(tmp_path: Path) -> None:
    ends_when_told = 'trap "exit 143" TERM\nmkfifo "$NOTES/told"\necho runs\nread -r _ <"$NOTES/told"\nexit 143\n'
    tells = 'echo >"$NOTES/told"\n'
    clone = Clone.make(
        tmp_path, {"srun": ends_when_told, "scontrol": REQUEUE_ENDS_IT, "scancel": tells, "squeue": RUNNING}
    )
    job = clone.start("launch/slurm/train.sbatch", "/runs/a", "7", SLURM_SUBMIT_DIR=str(tmp_path), **SLURM)
    assert job.stdout is not None
    assert "meeting at" in job.stdout.readline()
    assert job.stdout.readline() == "runs\n"
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    assert "told to stop" in output
    assert "ended with status 143" in output
    assert clone.noted("scancel") == ["--signal", "TERM", "12345"]
    assert "requeue" in clone.noted("scontrol")


def test_no_secret_stands_in_a_manifest() -> None:
    """Containers get them by reference, and the nodes of compose from the environment of who starts them."""
    for path in KUBERNETES:
        documents = list(yaml.safe_load_all(path.read_text()))
        assert all(document["kind"] != "Secret" for document in documents)
        for (container,) in found(documents, "containers"):
            assert {"secretRef": {"name": "checkpoint-store"}} in container["envFrom"]
            assert not any("KEY" in each["name"] for each in container["env"])
    for service in yaml.safe_load(COMPOSE.read_text())["services"].values():
        keys = {name: value for name, value in service["environment"].items() if "KEY" in name}
        assert len(keys) == 2
        assert all(value.startswith("${") for value in keys.values())
