"""The same with real devices: bit for bit, page-locked once, and training's thread waits for no device."""

from __future__ import annotations

import io
import logging
import mmap
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.profiler import ProfilerActivity, profile

import shardckpt as sc
from shardckpt.engine.saving.devices import cuda as cuda_module
from shardckpt.storage.memory import MemoryStorage

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
LIMIT = timedelta(seconds=120)


class Training:
    """Some megabytes, a buffer, a view that is not contiguous, and a conjugated one."""

    def __init__(self, kind: str = "fused", device: str = "cuda") -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(1024, 1024, bias=n == 0) for n in range(4)]
        self.model = torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(1024)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, **{kind: True})
        base = torch.randn(300, 500, device=device, dtype=torch.complex64)
        self.odd = {"turned": base.t(), "conj": base.conj(), "part": base[::2, 1:]}
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "odd": self.odd}
        self.inputs = torch.randn(64, 1024, device=device)

    def step(self) -> None:
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def copy(self) -> dict[str, Any]:
        """On the device, in the order of its stream."""
        moments = self.optimizer.state_dict()["state"]
        return {
            "model": {name: value.clone() for name, value in self.model.state_dict().items()},
            "state": {n: {key: value.clone() for key, value in values.items()} for n, values in moments.items()},
            "odd": {name: value.clone() for name, value in self.odd.items()},
        }


def check(place: MemoryStorage, expected: dict[int, dict[str, Any]]) -> None:
    for step, wanted in expected.items():
        model = torch.load(io.BytesIO(place.read(f"step_{step}/model.pt")), weights_only=True)["model"]
        rest = torch.load(io.BytesIO(place.read(f"step_{step}/rank_0.pt")), weights_only=True)
        for name, value in wanted["model"].items():
            assert torch.equal(model[name], value.cpu()), f"{name} of step {step}"
        for name, value in wanted["odd"].items():
            assert torch.equal(rest["odd"][name], value.cpu().resolve_conj()), f"{name} of step {step}"
        for found, values in zip(rest["optimizer"]["state"].values(), wanted["state"].values(), strict=True):
            for key, value in values.items():
                assert torch.equal(found[key], value.cpu()), f"{key} of step {step}"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each memory that is page-locked."""
    seen: list[int] = []
    real = cuda_module._register

    def register(device: torch.device, address: int, nbytes: int) -> None:
        real(device, address, nbytes)
        seen.append(nbytes)

    monkeypatch.setattr(cuda_module, "_register", register)
    return seen


@pytest.mark.parametrize("kind", ["foreach", "fused"])
@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("staging", ["overlap", "blocking", "none"])
def test_what_is_committed_is_what_was_there(kind: str, own_stream: bool, staging: Any) -> None:
    place, expected = MemoryStorage(), {}
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with (
        torch.cuda.stream(stream),
        sc.CheckpointManager(
            place, sc.Gangs.local(), saving=sc.SavePolicy(staging=staging), timeout=LIMIT
        ) as checkpoints,
    ):
        training = Training(kind)
        for step in range(1, 6):
            training.step()
            expected[step] = training.copy()
            checkpoints.save(step, training.state)
            training.model[4].running_mean.add_(1)
            for _ in range(3):
                training.step()
    torch.cuda.synchronize()
    check(place, expected)


def test_memory_is_page_locked_once_in_twenty_saves(registered: list[int]) -> None:
    training = Training()
    with sc.CheckpointManager(MemoryStorage(), sc.Gangs.local(), timeout=LIMIT) as checkpoints:
        for step in range(1, 21):
            training.step()
            checkpoints.save(step, training.state).result(LIMIT)
            checkpoints.delete_checkpoint(step)
        (stager,) = checkpoints._saver._flights._stagers
        assert stager.locked_nbytes == sum(registered)
        assert all(image.tensor(0, torch.uint8, (64,)).is_pinned() for image in stager._images() if image.is_locked)
    assert len(registered) == 2


def test_training_s_thread_waits_for_no_device() -> None:
    """From `save` to the end of the step that follows, once memory is page-locked."""
    training = Training()
    with sc.CheckpointManager(MemoryStorage(), sc.Gangs.local(), timeout=LIMIT) as checkpoints:
        for step in (1, 2):
            training.step()
            checkpoints.save(step, training.state).result(LIMIT)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            with torch.profiler.record_function("here"):
                pending = checkpoints.save(3, training.state)
                training.step()
            pending.result(LIMIT)
    events = seen.events()
    (here,) = [event for event in events if event.name == "here" and event.device_type == torch.profiler.DeviceType.CPU]
    names = {event.name for event in events}
    assert "cudaMemcpyAsync" in names
    span = here.time_range
    inside = [event for event in events if span.start <= event.time_range.start and event.time_range.end <= span.end]
    mine = [event.name for event in inside if event.thread == here.thread]
    assert "cudaDeviceSynchronize" not in mine
    assert "cudaStreamSynchronize" not in mine
    assert "cudaEventSynchronize" not in mine


def test_without_page_locked_memory(
    monkeypatch: pytest.MonkeyPatch, registered: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_module, "lockable_nbytes", lambda ranks: 0)
    place, expected, training = MemoryStorage(), {}, Training()
    with (
        caplog.at_level(logging.WARNING),
        sc.CheckpointManager(place, sc.Gangs.local(), timeout=LIMIT) as checkpoints,
    ):
        for step in (1, 2, 3):
            training.step()
            expected[step] = training.copy()
            checkpoints.save(step, training.state)
            training.step()
    check(place, expected)
    assert registered == []
    assert "are not page-locked" in caplog.text


def test_a_refusal_of_cuda_is_not_left_for_training_to_find() -> None:
    """Memory that is locked already cannot be locked again; the error stays with the thread that met it."""
    torch.zeros(1, device="cuda")
    devices, memory, place = cuda_module.Cuda(), mmap.mmap(-1, 1 << 20), torch.device("cuda", 0)
    unlock = devices.lock(memory, place)
    with pytest.raises(OSError, match="cudaHostRegister failed"):
        devices.lock(memory, place)
    assert torch.ones(10, device="cuda").add(1).sum().item() == 20
    unlock()


@pytest.fixture
def one_rank() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("cpu:gloo,cuda:nccl", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


@pytest.mark.leaks(threads=("",), files=("socket:", "anon_inode:"), why="NCCL and gloo keep theirs")
def test_shards_of_fsdp2_that_are_gathered_and_freed_meanwhile(one_rank: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    place, expected = MemoryStorage(), {}
    training = Training("foreach")
    for layer in training.model:
        fully_shard(layer, mesh=one_rank)
    fully_shard(training.model, mesh=one_rank)
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.01, foreach=True)
    training.state |= {"optimizer": training.optimizer}
    with sc.CheckpointManager(place, sc.Gangs.local(), timeout=LIMIT) as checkpoints:
        for step in range(1, 5):
            training.step()
            expected[step] = {
                name: (value.to_local() if hasattr(value, "to_local") else value).clone()
                for name, value in training.model.state_dict().items()
            }
            checkpoints.save(step, training.state)
            training.step()
            training.step()
    for step, wanted in expected.items():
        found: dict[str, Any] = {}
        for name in place.list(f"step_{step}"):
            if name.endswith(".pt"):
                content = torch.load(io.BytesIO(place.read(f"step_{step}/{name}")), weights_only=True)
                found |= content.get("model", {})
        for name, value in wanted.items():
            assert torch.equal(found[name].reshape(-1), value.cpu().reshape(-1)), f"{name} of step {step}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_in_one_process() -> None:
    place, expected = MemoryStorage(), {}
    one, two = (Training("fused", f"cuda:{n}") for n in range(2))
    with sc.CheckpointManager(place, sc.Gangs.local(), timeout=LIMIT) as checkpoints:
        for step in (1, 2, 3):
            one.step()
            two.step()
            expected[step] = one.copy()
            checkpoints.save(step, {**one.state, "other": two.model, "other optimizer": two.optimizer})
            one.step()
            two.step()
    check(place, expected)
