"""Plain parts of hand-written tensor parallelism become DTensors of another mesh, and DTensors become plain parts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardckpt as sc
from tests.distributed.jobs import checkpoints, full

WHOLE = {"up.weight": (8, 3), "up.bias": (8,), "down.weight": (3, 8), "down.bias": (3,)}
CUTS = {"up.weight": 0, "up.bias": 0, "down.weight": 1}


def content(name: str) -> torch.Tensor:
    return torch.arange(float(torch.Size(WHOLE[name]).numel())).view(WHOLE[name]) + len(name)


def plain_parts(mesh: DeviceMesh, *, blank: bool) -> nn.Module:
    """What a rank has on the "tp" dimension of the mesh."""
    rank, size = mesh["tp"].get_local_rank(), mesh["tp"].size()
    model = nn.ModuleDict({"up": nn.Module(), "down": nn.Module()})
    for name in WHOLE:
        part = content(name).chunk(size, CUTS[name])[rank] if name in CUTS else content(name)
        module, _, own = name.partition(".")
        model[module].register_parameter(own, nn.Parameter(torch.zeros_like(part) if blank else part.clone()))
    return model


def dtensors(mesh: DeviceMesh, *, blank: bool) -> dict[str, torch.Tensor]:
    """All cut in their last dimension, over all ranks."""
    wholes = {name: content(name) * (0 if blank else 1) for name in WHOLE}
    return {name: distribute_tensor(whole, mesh, [Shard(whole.ndim - 1)]) for name, whole in wholes.items()}


def save_parts(rank: int, world_size: int, folder: Path, root: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))  # neighbours hold the same
    with checkpoints(root / "parts", mesh) as manager:
        manager.save(1, {"model": sc.TensorSplit(plain_parts(mesh, blank=False), CUTS)}).result()
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    with checkpoints(root / "dtensors", line) as manager:
        manager.save(1, {"model": dtensors(line, blank=False)}).result()


def load_parts(rank: int, world_size: int, folder: Path, root: Path) -> list[str]:
    """On three ranks as DTensors, and on two or one as parts; the names of what is not what it was."""
    line = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    found = dtensors(line, blank=True)
    with checkpoints(root / "parts", line) as manager:
        manager.resume({"model": found})
    wrong = [name for name, tensor in found.items() if not torch.equal(full(tensor), content(name))]
    if world_size != 3:
        mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "tp"))
        model, same = plain_parts(mesh, blank=True), plain_parts(mesh, blank=False).state_dict()
        with checkpoints(root / "dtensors", mesh) as manager:
            manager.resume({"model": sc.TensorSplit(model, CUTS)})
        wrong += [f"{name}, a part" for name, part in model.state_dict().items() if not torch.equal(part, same[name])]
    return wrong


def test_parts_and_dtensors_are_the_same_tensors(ranks, tmp_path):
    ranks.run(4, save_parts, tmp_path)
    for world_size in (3, 2):
        assert ranks.run(world_size, load_parts, tmp_path) == [[]] * world_size
