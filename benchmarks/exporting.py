"""`python -m benchmarks.exporting`: a sharded step as one file, beside copying the same bytes, and DCP's own way.

The step is of two tensor-parallel ranks, half of whose tensors are cut by rows and half by columns. By turns, each in a
process of its own, whose memory is looked at every 5 ms: its files copied one by one (read and written in blocks);
`sc.export` as safetensors and as `.pt`; `dcp_to_torch_save` of a DCP checkpoint of the same tensors. All durable (fsync
of files and folder). The files of the first round are compared, tensor by tensor, before any number counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import shardckpt as sc
from benchmarks.cells import Spread
from benchmarks.engines import sync
from benchmarks.limits import machine_facts
from benchmarks.rounds import wait_until_quiet
from shardckpt.testing.gangs import run_ranks

_BLOCK = 16 << 20
_WIDTH = 4096
_RANKS = 2
_DEADLINE_S = 600.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exporting", description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the model, in 10^9 bytes (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--root", type=Path, help="a folder on the disk to measure (default: where temporary files go)")
    parser.add_argument("--patience", type=float, default=0.0, metavar="MINUTES",
                        help="how long a turn waits at most until others leave the processors alone")  # fmt: skip
    parser.add_argument("--turn", nargs=3, metavar=("WAY", "FOLDER", "TO"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.turn:
        way, folder, to = given.turn
        print(json.dumps(_measured(way, Path(folder), Path(to))))
        return 0
    root = given.root or Path(tempfile.gettempdir())
    print(", ".join(f"{key}: {value}" for key, value in machine_facts(root).items()))
    with tempfile.TemporaryDirectory(prefix="exporting-", dir=root) as name:
        folder = Path(name)
        nbytes = _prepare(folder, round(given.gb * 1e9))
        turns: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(given.rounds):
            for way in WAYS:
                wait_until_quiet(given.patience * 60)
                turns[way].append(_turn(way, folder, folder / f"{way}.out"))
            if number == 0:
                _compare(folder)
            for way in WAYS:
                subprocess.run(["rm", "-rf", str(folder / f"{way}.out")], check=True)
        print(render(nbytes, turns))
    return 0


def _prepare(folder: Path, nbytes: int) -> int:
    """The step of two ranks, and DCP's checkpoint of the same tensors; gives the bytes of the tensors."""
    count = max(nbytes // (4 * _WIDTH * _WIDTH), 1)
    torch.manual_seed(0)
    wholes = [torch.randn(_WIDTH, _WIDTH) for _ in range(count)]

    def save(gangs: sc.Gangs) -> None:
        model, rules = nn.ParameterDict(), dict[str, int]()
        for number, tensor in enumerate(wholes):
            name, dim = f"w{number}", number % 2
            model[name], rules[name] = nn.Parameter(tensor.chunk(_RANKS, dim)[gangs.tp.rank]), dim
        with sc.CheckpointManager(folder / "run", gangs) as manager:
            manager.save(1, {"model": sc.TensorSplit(model, rules)}).result()

    run_ranks(_RANKS, save, tp=_RANKS)
    dcp_save({f"w{n}": tensor for n, tensor in enumerate(wholes)}, checkpoint_id=folder / "dcp", no_dist=True)
    return sum(tensor.nbytes for tensor in wholes)


def _turn(way: str, folder: Path, to: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.exporting", "--turn", way, str(folder), str(to)]
    told = subprocess.run(command, check=True, timeout=_DEADLINE_S, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(told.splitlines()[-1])
    return found


def _measured(way: str, folder: Path, to: Path) -> dict[str, float]:
    """Seconds, and the most memory of its own beyond what the process had before, in bytes."""
    done, most, before = threading.Event(), [0], _own_memory()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], _own_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.perf_counter()
    WAYS[way](folder, to)
    seconds = time.perf_counter() - began
    done.set()
    watching.join()
    return {"seconds": seconds, "peak": max(most[0] - before, 0)}


def _own_memory() -> int:
    """Bytes that the process holds, without the pages of files that it has mapped, which are the page cache's."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


def _copy(folder: Path, to: Path) -> None:
    to.mkdir()
    for path in sorted((folder / "run/step_1").glob("*.pt")):
        with path.open("rb", buffering=0) as source, (to / path.name).open("wb", buffering=0) as target:
            block = bytearray(_BLOCK)
            while count := source.readinto(block):
                target.write(memoryview(block)[:count])
            os.fsync(target.fileno())
    sync(to)


def _safetensors(folder: Path, to: Path) -> None:
    sc.export(folder / "run", to, max_file_nbytes=1 << 50)


def _archive(folder: Path, to: Path) -> None:
    sc.export(folder / "run", to, form="pt")


def _of_dcp(folder: Path, to: Path) -> None:
    to.mkdir()
    dcp_to_torch_save(folder / "dcp", to / "model.pt")
    sync(to / "model.pt")
    sync(to)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "copy": _copy,
    "export safetensors": _safetensors,
    "export pt": _archive,
    "dcp_to_torch_save": _of_dcp,
}


def _compare(folder: Path) -> None:
    """All three are the same tensors, or nothing was measured."""
    found = [
        load_file(folder / "export safetensors.out/model.safetensors"),
        torch.load(folder / "export pt.out/pytorch_model.bin", mmap=True, weights_only=True),
        torch.load(folder / "dcp_to_torch_save.out/model.pt", mmap=True, weights_only=True),
    ]
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
        assert torch.equal(tensor, found[2][name]), name


def render(nbytes: int, turns: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: seconds (the middle turn, and the range), against the copy, and memory."""
    lines = [
        f"\n{nbytes / 1e9:.2f} GB of tensors, step of {_RANKS} ranks; {len(turns['copy'])} rounds\n",
        "| | seconds | against the copy | peak memory, MiB |",
        "| --- | ---: | ---: | ---: |",
    ]
    spreads = {way: Spread.of(turn["seconds"] for turn in those) for way, those in turns.items()}
    copied = spreads["copy"]
    for way, seconds in spreads.items():
        assert seconds is not None
        assert copied is not None
        text = f"{seconds.middle:.2f} ({seconds.least:.2f} to {seconds.most:.2f})"
        peak = max(turn["peak"] for turn in turns[way]) / 2**20
        lines.append(f"| {way} | {text} | {seconds.middle / copied.middle:.2f} | {peak:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
