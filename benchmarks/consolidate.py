"""`python -m benchmarks.consolidate`: the consolidated model file, beside what torch offers for it.

Ours is `write_consolidated`; torch's is `get_model_state_dict(full_state_dict=True, cpu_offload=True)` on all ranks and
`torch.save` on rank 0. Both by turns in the same processes, both durable (fsync of file and folder); a model of random
bits, sharded by FSDP2 on two ranks and by FSDP2 and tensor parallelism on four. The files of the first round are
compared, tensor by tensor, before any number counts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardckpt as sc
from benchmarks.cells import Spread
from benchmarks.engines import sync
from benchmarks.limits import machine_facts
from benchmarks.rounds import wait_until_quiet
from benchmarks.states import Llama
from shardckpt.engine.consolidated.write import write_consolidated
from shardckpt.engine.coordinates import Coordinates
from shardckpt.gang.wire.ending import leave
from shardckpt.storage.local import LocalStorage

CASES = {"FSDP2, 2 ranks": (2, 1), "FSDP2 x TP, 4 ranks": (2, 2)}
"""Name -> sizes of the mesh (dp, tp)."""
_WIDTH, _VOCABULARY = 1024, 32_000
_PLAN: dict[str, Any] = {
    **dict.fromkeys(("query", "key", "value", "gate", "up"), ColwiseParallel()),
    **dict.fromkeys(("attention_output", "down"), RowwiseParallel()),
}
_DEADLINE_S = 1800.0
_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Task:
    """What the ranks of one case do; travels as JSON."""

    dp: int
    tp: int
    nbytes: int
    rounds: int
    folder: str
    patience_s: float
    """How long a turn waits at most for the processors to be idle."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One measurement: seconds until the slowest rank was done, and the most memory beyond the shards, by rank."""

    seconds: float
    peaks: list[int]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.consolidate", description=__doc__)
    parser.add_argument("--gb", type=float, default=0.75, help="size of the model, in 10^9 bytes (default: 0.75)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE",
                        help=f"some of: {'; '.join(CASES)} (default: all)")  # fmt: skip
    parser.add_argument("--root", type=Path, help="a folder on the disk to measure (default: where temporary files go)")
    parser.add_argument("--patience", type=float, default=0.0, metavar="MINUTES",
                        help="how long a turn waits at most until others leave the processors alone")  # fmt: skip
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.job:
        _run_job(Task(**json.loads(given.job)))
        return 0
    root = given.root or Path(tempfile.gettempdir())
    facts = machine_facts(root)
    print(", ".join(f"{key}: {value}" for key, value in facts.items()))
    for name in given.cases:
        dp, tp = CASES[name]
        with tempfile.TemporaryDirectory(prefix="consolidate-", dir=root) as folder:
            task = Task(dp, tp, round(given.gb * 1e9), given.rounds, folder, given.patience * 60)
            print(render(name, _start(task)), flush=True)
    return 0


def _start(task: Task) -> dict[str, Any]:
    """The ranks of a case, in processes of their own; gives what rank 0 found out."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(task.dp * task.tp), "-m", "benchmarks.consolidate", "--job", json.dumps(asdict(task))]
    here = str(Path(__file__).resolve().parent.parent)
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run(command, env=environment, check=True, timeout=_DEADLINE_S, stdout=sys.stderr)
    found: dict[str, Any] = json.loads((Path(task.folder) / "result.json").read_text())
    return found


def render(name: str, found: dict[str, Any]) -> str:
    """Markdown: seconds and memory of both, and the ratio."""
    lines = [f"\n**{name}**: {found['nbytes'] / 1e9:.2f} GB in {found['tensors']} tensors, the largest "
             f"{found['largest'] / 2**20:.0f} MiB; {len(found['turns']['shardckpt'])} rounds\n",
             "| | seconds | against ours | memory beyond the shards, MiB: rank 0 | the other ranks |",
             "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    ours = Spread.of(turn["seconds"] for turn in found["turns"]["shardckpt"])
    assert ours is not None
    for engine, turns in found["turns"].items():
        seconds = Spread.of(turn["seconds"] for turn in turns)
        peaks = [Spread.of(turn["peaks"][0] / 2**20 for turn in turns),
                 Spread.of(max(turn["peaks"][1:]) / 2**20 for turn in turns)]  # fmt: skip
        assert seconds is not None
        cells = [
            engine,
            _cell(seconds, 2),
            f"{seconds.middle / ours.middle:.2f} x",
            *(_cell(peak, 0) for peak in peaks),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(spread: Spread | None, digits: int) -> str:
    assert spread is not None
    return f"{spread.middle:.{digits}f} ({spread.least:.{digits}f}-{spread.most:.{digits}f})"


def _run_job(task: Task) -> None:
    """On every rank."""
    dist.init_process_group("gloo")
    try:
        mesh = init_device_mesh("cpu", (task.dp, task.tp), mesh_dim_names=("dp", "tp"))
        model = _make_model(task, mesh)
        with Both(model, Path(task.folder)) as both:
            turns: dict[str, list[Any]] = {name: [] for name in both.ways}
            for number in range(task.rounds):
                for name, write in both.ways.items():
                    turns[name].append(asdict(_measure(write, task.patience_s)))
                if number == 0 and dist.get_rank() == 0:
                    both.compare()
                both.clear()
        if dist.get_rank() == 0:
            whole = [p.numel() * p.element_size() for p in model.parameters()]
            found = {"turns": turns, "nbytes": sum(whole), "tensors": len(whole), "largest": max(whole)}
            (Path(task.folder) / "result.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def _make_model(task: Task, mesh: DeviceMesh) -> nn.Module:
    """Sharded before it has any memory, so that no rank ever holds it whole; every element is random."""
    with torch.device("meta"):
        one, two = (sum(p.numel() for p in Llama(_WIDTH, n, _VOCABULARY).parameters()) for n in (1, 2))
        layers = max(1, round((task.nbytes // 2 - one) / (two - one)) + 1)  # two bytes each
        model = Llama(_WIDTH, layers, _VOCABULARY)
    if task.tp > 1:
        plan: dict[str, Any] = {"embedding": ColwiseParallel(), "output": ColwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        for layer in model.layers:
            parallelize_module(layer, mesh["tp"], _PLAN)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    model.to_empty(device="cpu")
    own, alike = (torch.Generator().manual_seed(n) for n in (dist.get_rank(), mesh["dp"].get_local_rank()))
    for parameter in model.parameters():
        local: torch.Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
        shared = local.dim() == 1  # norms, which tensor-parallel ranks hold alike
        local.view(torch.int16).random_(-30_000, 30_000, generator=alike if shared else own)
    return model


class Both:
    """Both ways to write the model, each to a file of its own."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self.ways: dict[str, Callable[[], None]] = {"shardckpt": self._ours, "torch": self._theirs}
        self._tries = 0

    def __enter__(self) -> Both:
        self._gangs = sc.Gangs.from_env()
        return self

    def __exit__(self, *_: object) -> None:
        self._gangs.close()

    def _ours(self) -> None:
        self._tries += 1
        gang = self._gangs.root
        gang.enter(f"round {self._tries}", timeout=_TIMEOUT)
        write_consolidated(
            LocalStorage(self._folder), gang, Coordinates.of(self._gangs), model=self._model, prefix="ours", step=1,
            timeout=_TIMEOUT,
        )  # fmt: skip

    def _theirs(self) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self._model, options=options)
        if dist.get_rank() == 0:
            file = self._folder / "theirs" / "model.pt"
            file.parent.mkdir(exist_ok=True)
            torch.save({"model": state, "model_key": "model"}, file)
            sync(file)
            sync(file.parent)

    def compare(self) -> None:
        """On rank 0: `AssertionError` unless both files hold the same."""
        ours, theirs = (
            torch.load(self._folder / name / "model.pt", mmap=True, weights_only=True)["model"]
            for name in ("ours", "theirs")
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name].view(torch.int16), tensor.view(torch.int16)), name

    def clear(self) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            for name in ("ours", "theirs"):
                shutil.rmtree(self._folder / name)
            os.sync()  # so that nobody measures the end of what was measured before
        dist.barrier()


def _measure(work: Callable[[], None], patience_s: float) -> Turn:
    if dist.get_rank() == 0:
        wait_until_quiet(patience_s)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be there to be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: man 5 proc
    before = _status("VmRSS")
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    seconds = time.perf_counter() - began
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, _status("VmHWM") - before)
    return Turn(seconds, peaks)


def _status(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    leave(main())
