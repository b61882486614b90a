"""All ranks of a job export together while it trains: what torch gathers, in files that others open."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardckpt as sc
from tests.distributed.jobs import full, keep_reference
from tests.storage.s3server import S3Server

WIDTH = 1203
MIB = 1 << 20
RANKS = 4


class Tied(nn.Module):
    """30 MB; the first and the last are tied. Nothing but their width is divided evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH - 3, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH - 3)
        self.last = nn.Linear(WIDTH - 3, WIDTH)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.down(torch.relu(self.up(torch.relu(self.first(x))))))
        return y


def laid_out(kind: str) -> tuple[nn.Module, DeviceMesh]:
    torch.manual_seed(7)
    model = Tied()
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(
            model, mesh["tp"], {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
        )
        fully_shard(model, mesh=mesh["dp"])
    return model, mesh


@dataclass(frozen=True)
class Place:
    """Where everything is: a folder, or on an object store."""

    root: str
    server: S3Server | None = None

    def at(self, name: str) -> Any:
        return f"{self.root}/{name}" if self.server is None else self.server.storage(f"{self.root}/{name}")


def export_while_training(
    rank: int, world_size: int, folder: Path, root: Place, here: Path, kind: str, forms: dict[str, dict[str, Any]]
) -> list[int]:
    """What this rank read for each export of step 1, during which the job trains on and saves more."""
    model, mesh = laid_out(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    gangs, read = sc.Gangs.from_mesh(mesh), [0] * len(forms)
    with sc.CheckpointManager(root.at("run"), gangs) as manager:
        manager.save(1, {"model": model}).result()
        keep_reference(here / "reference.pt", {n: full(v) for n, v in get_model_state_dict(model).items()})
        mine = gangs.fork("export")

        def export() -> None:
            for number, (name, options) in enumerate(forms.items()):

                def told(step: int, nbytes: int, total: int, number: int = number) -> None:
                    read[number] += nbytes

                means = sc.Means(budget_nbytes=16 * MIB, gangs=mine, told=told)
                sc.export(root.at("run"), root.at(name), step=1, means=means, **options)

        thread = Thread(target=export)
        thread.start()
        for step in range(2, 5):
            model(torch.ones(2, WIDTH - 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            manager.save(step, {"model": model})
        thread.join()
        manager.wait()
        assert manager.latest() == 4
        mine.close()
    return read


FORMS: dict[str, dict[str, Any]] = {
    "one.safetensors": {},
    "several": {"max_file_nbytes": 8_000_000, "dtype": "bfloat16"},
    "one.pt": {"form": "pt"},
}


@pytest.mark.parametrize("kind", ["hsdp", "fsdp2 x tp"])
@pytest.mark.sampled(2)
def test_all_ranks_export_while_they_train(ranks: Any, tmp_path: Path, kind: str) -> None:
    read = ranks.run(RANKS, export_while_training, Place(str(tmp_path)), tmp_path, kind, FORMS, timeout=100)
    reference = torch.load(tmp_path / "reference.pt", weights_only=True)
    tied = reference.pop("last.weight")
    whole = torch.load(tmp_path / "one.pt", mmap=True, weights_only=True)
    assert whole["last.weight"].data_ptr() == whole["first.weight"].data_ptr()
    assert same(whole, {**reference, "last.weight": tied})
    assert same(load_file(tmp_path / "one.safetensors"), reference)
    index = json.loads((tmp_path / "several/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == reference.keys()
    found = {
        n: v for name in set(index["weight_map"].values()) for n, v in load_file(tmp_path / "several" / name).items()
    }
    assert same(found, {name: value.to(torch.bfloat16) for name, value in reference.items()})
    nbytes = sum(value.nbytes for value in reference.values())
    for of_one in range(2):  # no rank had much more than its part of it
        assert max(each[of_one] for each in read) < nbytes * (0.35 if of_one == 0 else 0.3)


@pytest.mark.s3
def test_the_same_on_an_object_store(ranks: Any, tmp_path: Path, server: S3Server) -> None:
    """The parts of one upload come from several ranks."""
    place = Place(f"s3://{server.bucket}/exports", server)
    ranks.run(RANKS, export_while_training, place, tmp_path, "hsdp", {"out": {}}, timeout=100)
    storage = place.at("out")
    assert storage.list() == ["model.safetensors"]
    reference = torch.load(tmp_path / "reference.pt", weights_only=True)
    del reference["last.weight"]
    assert same(load(storage.read("model.safetensors")), reference)
    storage.close()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )
