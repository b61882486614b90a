"""No rank gathers the model: what a rank needs beside its shards does not grow with the model."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.distributed.consolidation import consolidate, gangs_here

MiB = 1 << 20
WIDTH, LAYERS = 2048, 24
LARGEST = 4 * WIDTH * WIDTH
"""Bytes of the largest tensor: 16 MiB."""
MODEL = LAYERS * LARGEST
BOUND = 1.2 * LARGEST + 64 * MiB


def model_of(kind: str) -> nn.Module:
    """384 MiB, over all ranks. Layers are sharded as they are made: no rank ever has all of it."""
    mesh = init_device_mesh("cpu", (2, 1) if kind != "fsdp2 x tp" else (1, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential()
    for number in range(LAYERS):
        layer = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.constant_(layer.weight, float(number + 1))
        if kind == "fsdp2 x tp":
            layer = parallelize_module(layer, mesh["tp"], RowwiseParallel() if number % 2 else ColwiseParallel())
        if kind == "fsdp1":
            layer = FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=bool(number % 2))
        else:
            fully_shard(layer, mesh=mesh["dp"])
        model.append(layer)
    return model


def peak_of(work: Callable[[], object]) -> int:
    """The most resident memory during the work, beyond what there was before it; bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed must not be there to be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: man 5 proc
    before = status("VmRSS")
    kept = work()
    peak = status("VmHWM") - before
    del kept
    return peak


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) << 10


def measure(rank: int, world_size: int, folder: Path, kind: str, gathered: bool) -> int:
    model = model_of(kind)
    gc.collect()
    with gangs_here() as gangs:
        if gathered:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            peak = peak_of(lambda: get_model_state_dict(model, options=options))
        else:
            peak = peak_of(lambda: consolidate(folder, gangs, model))
            check(folder / "step_1" / "model.pt", rank)
    return peak


def check(file: Path, rank: int) -> None:
    dist.barrier()
    if rank == 0:
        state = torch.load(file, mmap=True, weights_only=True)["model"]
        for number in range(LAYERS):
            weight = state[f"{number}.weight"]
            assert weight.shape == (WIDTH, WIDTH)
            assert (weight == number + 1).all()
    dist.barrier()


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2 x tp", "fsdp1"])
@pytest.mark.sampled(2)
def test_no_rank_needs_more_than_the_bound(ranks, kind):
    peaks = ranks.run(2, measure, kind, False)
    print(kind, [f"{peak / MiB:.0f} MiB" for peak in peaks])
    assert max(peaks) < BOUND, f"{[f'{peak / MiB:.0f} MiB' for peak in peaks]}, allowed are {BOUND / MiB:.0f}"


def test_the_measure_sees_a_rank_that_gathers(ranks):
    assert ranks.run(2, measure, "fsdp2", True)[0] > MODEL > 4 * BOUND
