"""The commands by which the starters begin: what their shell scripts would run, and what stands in the manifests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.house.source import ROOT

IN_THE_IMAGE = "/opt/shardckpt"
"""Where the repository is, in the image."""
KUBERNETES = sorted((ROOT / "launch/kubernetes").glob("*.yaml"))
COMPOSE = ROOT / "docker/compose.yaml"

_NOTE = """#!/usr/bin/env bash
printf '%s\\n' "$@" >>"$NOTES/${0##*/}"
printf '%s=%s\\n' TORCH_DISABLE_SHARE_RDZV_TCP_STORE "${TORCH_DISABLE_SHARE_RDZV_TCP_STORE-}" \\
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT-}" \\
    OMP_NUM_THREADS "${OMP_NUM_THREADS-}" >"$NOTES/environment"
"""


@dataclass(frozen=True)
class Command:
    """What is to be run, and the part of its environment that the starter sets by itself."""

    place: str
    words: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Clone:
    """A copy of `launch/` whose programs (torchrun, srun, ...) only note how they were called."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, programs: dict[str, str]) -> Clone:
        """`programs`: shell code for some of them, after the noting."""
        shutil.copytree(ROOT / "launch", folder / "launch")
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / "notes").mkdir()
        for name, code in {"torchrun": "", **programs}.items():
            (folder / ".venv/bin" / name).write_text(_NOTE + code)
            (folder / ".venv/bin" / name).chmod(0o755)
        return cls(folder)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        bare = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH", "OMP_", "SLURM"))}
        path = f"{self.folder / '.venv/bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", *words],
            cwd=self.folder,
            env={**bare, "PATH": path, "NOTES": str(self.folder / "notes"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        """Status and output."""
        process = self.start(*words, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def noted(self, program: str) -> list[str]:
        """The arguments that it was given; none if it was not called."""
        note = self.folder / "notes" / program
        return note.read_text().splitlines() if note.exists() else []

    def environment(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.noted("environment"))


def of_kubernetes() -> Iterator[Command]:
    """Of each container, with what its operator adds in the environment said as options."""
    for path in KUBERNETES:
        documents = list(yaml.safe_load_all(path.read_text()))
        trainers = [document["spec"]["trainer"] for document in documents if document["kind"] == "TrainJob"]
        for container in found(documents, "containers"):
            given = trainers[0] if trainers else container[0]
            words = (*given["command"], *_operator(documents), *given["args"])
            environment = {each["name"]: each["value"] for each in container[0]["env"]}
            yield Command(path.name, words, environment)


def _operator(documents: list[dict[str, Any]]) -> list[str]:
    """What the Kubeflow Training Operator says to torchrun, by PET_ variables, about a PyTorchJob."""
    job = documents[0]
    if job["kind"] != "PyTorchJob":
        return []
    policy, name = job["spec"]["elasticPolicy"], job["metadata"]["name"]
    conf = ",".join(f"{each['key']}={each['value']}" for each in policy["rdzvConf"])
    return [
        f"--nnodes={policy['minReplicas']}:{policy['maxReplicas']}",
        f"--nproc-per-node={job['spec']['nprocPerNode']}",
        f"--max-restarts={policy['maxRestarts']}",
        f"--rdzv-backend={policy['rdzvBackend']}",
        f"--rdzv-endpoint={name}-worker-0:{policy['rdzvPort']}",
        f"--rdzv-id={policy['rdzvId']}",
        f"--rdzv-conf={conf}",
    ]


def of_compose() -> Iterator[Command]:
    """Of each training node, with the defaults of what it takes from the environment."""
    for name, service in yaml.safe_load(COMPOSE.read_text())["services"].items():
        if service["command"][0] == "torchrun":
            words = tuple(re.sub(r"\$\{\w+-(.*?)\}", r"\1", word) for word in service["command"])
            yield Command(f"{COMPOSE.name}: {name}", words, service["environment"])


def found(tree: Any, key: str) -> Iterator[Any]:
    """The values under that key, anywhere."""
    if isinstance(tree, dict):
        if key in tree:
            yield tree[key]
        for value in tree.values():
            yield from found(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from found(value, key)
