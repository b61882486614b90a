"""What `benchmarks.exporting` compares: tensors as each way finds them, and each way to make one file of them.

Every way is durable (fsync of files and folders), and is called in a process of its own; those by several ranks in one
for each of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import shardckpt as sc
from benchmarks.engines import sync
from benchmarks.gauges import forget, remember
from shardckpt.format.checksum import crc32
from shardckpt.testing.gangs import run_ranks

_BLOCK = 16 << 20
RANKS = 2
"""That hold the model, each a part of every tensor; and that export it together."""
_SUMS = "sums.json"


def prepare(folder: Path, nbytes: int, width: int) -> int:
    """The same tensors of `width` x `width` as a step of tensor-parallel ranks, as DCP's checkpoint, and as the shards
    that DCP's consolidation takes; half are cut by rows and half by columns. Gives the bytes of the tensors."""
    count = max(nbytes // (4 * width * width), 1)
    torch.manual_seed(0)
    wholes = {f"w{n}": torch.randn(width, width) for n in range(count)}
    (folder / _SUMS).write_text(json.dumps({name: crc32(_bytes_of(tensor)) for name, tensor in wholes.items()}))

    def save(gangs: sc.Gangs) -> None:
        model, rules = nn.ParameterDict(), dict[str, int]()
        for number, (name, tensor) in enumerate(wholes.items()):
            model[name], rules[name] = nn.Parameter(tensor.chunk(RANKS, number % 2)[gangs.tp.rank]), number % 2
        with sc.CheckpointManager(folder / "run", gangs, saving=sc.SavePolicy(staging="none")) as manager:
            manager.save(1, {"model": sc.TensorSplit(model, rules)}).result()

    run_ranks(RANKS, save, tp=RANKS)
    dcp_save(dict(wholes), checkpoint_id=folder / "dcp", no_dist=True)
    (folder / "shards").mkdir()
    for rank in range(RANKS):
        own, offsets = dict[str, torch.Tensor](), dict[str, object]()
        for number, (name, tensor) in enumerate(wholes.items()):
            own[name] = tensor.chunk(RANKS, number % 2)[rank].contiguous()
            at = [rank * width // RANKS, 0]
            offsets[name] = {"saved_offsets": at if number % 2 == 0 else at[::-1]}
        file = folder / f"shards/shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        save_file(own, file, metadata={"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"})
    return sum(tensor.nbytes for tensor in wholes.values())


def compare(folder: Path, to: Path) -> None:
    """`AssertionError` unless what was made has the very tensors."""
    sums: dict[str, int] = json.loads((folder / _SUMS).read_text())
    found: dict[str, int] = {}
    for file in to.iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                names = list(opened.keys())
                found |= {name: crc32(_bytes_of(opened.get_tensor(name))) for name in names}
        elif file.suffix in (".pt", ".bin"):
            whole = torch.load(file, mmap=True, weights_only=True)
            found |= {name: crc32(_bytes_of(tensor)) for name, tensor in whole.items()}
    assert found == sums, f"{to.name} has other tensors"


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _copy(folder: Path, to: Path, gangs: sc.Gangs) -> None:
    to.mkdir()
    for path in _files_of_step(folder):
        with path.open("rb", buffering=0) as source, (to / path.name).open("wb", buffering=0) as target:
            block = bytearray(_BLOCK)
            while count := source.readinto(block):
                target.write(memoryview(block)[:count])
            os.fsync(target.fileno())
    sync(to)


def _cp(folder: Path, to: Path, gangs: sc.Gangs) -> None:
    to.mkdir()
    subprocess.run(["cp", "--reflink=never", *map(str, _files_of_step(folder)), str(to)], check=True)
    _sync_all(to)


def _files_of_step(folder: Path) -> list[Path]:
    return sorted((folder / "run/step_1").glob("*.pt"))


def _safetensors(folder: Path, to: Path, gangs: sc.Gangs) -> None:
    sc.export(folder / "run", to, max_file_nbytes=1 << 50, means=sc.Means(gangs=gangs))


def _archive(folder: Path, to: Path, gangs: sc.Gangs) -> None:
    sc.export(folder / "run", to, form="pt", means=sc.Means(gangs=gangs))


def _dcp_to_torch_save(folder: Path, to: Path, gangs: sc.Gangs) -> None:
    to.mkdir()
    dcp_to_torch_save(folder / "dcp", to / "model.pt")
    _sync_all(to)


def _consolidate(folder: Path, to: Path, *, files: int) -> None:
    """As many threads as files: it knows no other way to use them."""
    to.mkdir()
    names = json.loads((folder / _SUMS).read_text())
    numbers = {name: number * files // len(names) + 1 for number, name in enumerate(names)}
    consolidate_safetensors_files(str(folder / "shards"), str(to), numbers, num_threads=files)
    _sync_all(to)


def _sync_all(to: Path) -> None:
    for path in (*to.iterdir(), to):
        sync(path)


@dataclass(frozen=True, slots=True)
class Way:
    """One row of the table."""

    act: Callable[[Path, Path, sc.Gangs], None]
    reads: str
    """The folder that it reads."""
    ranks: int = 1


WAYS: Mapping[str, Way] = {
    "copy": Way(_copy, "run"),
    "cp": Way(_cp, "run"),
    "export, safetensors": Way(_safetensors, "run"),
    "export, pt": Way(_archive, "run"),
    f"export by {RANKS} ranks, safetensors": Way(_safetensors, "run", RANKS),
    f"export by {RANKS} ranks, pt": Way(_archive, "run", RANKS),
    "consolidate_safetensors_files": Way(lambda f, to, _: _consolidate(f, to, files=1), "shards"),
    "consolidate_safetensors_files, 2 files": Way(lambda f, to, _: _consolidate(f, to, files=2), "shards"),
    "dcp_to_torch_save": Way(_dcp_to_torch_save, "dcp"),
}


def make_ready(folder: Path, way: Way, *, cold: bool) -> None:
    """Before a turn: nothing is left to be written, and what it reads is all in the page cache, or none of it."""
    os.sync()
    for path in (folder / way.reads).rglob("*"):
        if path.is_file():
            (forget if cold else remember)(path)


def clear(to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
