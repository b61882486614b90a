"""How much may be page-locked and where it is touched first; and that CUDA is asked as it must be, without any."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from shardckpt.engine.saving.devices import cuda as cuda_module
from shardckpt.engine.saving.devices.cuda import Cuda
from shardckpt.engine.saving.devices.room import apart, lockable_nbytes, processors_near
from shardckpt.gang.gangs import ranks_of_machine

GPU = torch.device("cuda", 1)


def machine(root: Path, *, available_kb: int, limit: str | None = None, used: str = "0") -> dict[str, Path]:
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available_kb} kB\n")
    if limit is not None:
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/memory.max").write_text(f"{limit}\n")
        (root / "sys/fs/cgroup/memory.current").write_text(f"{used}\n")
    return {"proc": root / "proc", "sys": root / "sys"}


def test_a_rank_may_lock_its_share_of_half_of_what_is_free(tmp_path: Path) -> None:
    assert lockable_nbytes(8, **machine(tmp_path / "a", available_kb=1 << 20)) == 1 << 26
    assert lockable_nbytes(1, **machine(tmp_path / "b", available_kb=1 << 20, limit="max")) == 1 << 29
    limited = machine(tmp_path / "c", available_kb=1 << 20, limit=str(3 << 20), used=str(1 << 20))
    assert lockable_nbytes(2, **limited) == 1 << 19
    assert lockable_nbytes(2, **machine(tmp_path / "d", available_kb=1, limit="5", used="9")) == 0
    assert lockable_nbytes(1, proc=tmp_path / "none", sys=tmp_path / "none") == 0
    assert lockable_nbytes(1) > 0


@pytest.mark.parametrize(
    ("node", "listed", "expected"),
    [("1", "0-2,8,10-11\n", {0, 1, 2, 8, 10, 11}), ("-1", "0-3", set()), ("0", "", set()), ("1", "odd", set())],
)
def test_the_processors_of_a_device(tmp_path: Path, node: str, listed: str, expected: set[int]) -> None:
    device, cpus = tmp_path / "bus/pci/devices/0000:3b:00.0", tmp_path / f"devices/system/node/node{node}"
    device.mkdir(parents=True)
    cpus.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    (cpus / "cpulist").write_text(listed)
    assert processors_near("0000:3b:00.0", sys=tmp_path) == expected
    assert processors_near("0000:99:00.0", sys=tmp_path) == frozenset()


@pytest.mark.skipif(platform.system() != "Linux", reason="threads are bound on Linux only")
def test_who_touches_memory_first_is_bound_and_nobody_else() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    assert apart(lambda: os.sched_getaffinity(0), processors=[one, 5000]) == {one}
    assert apart(lambda: os.sched_getaffinity(0), processors=[5000]) == before
    assert apart(lambda: threading.current_thread().name) == "shardckpt-lock"
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("said", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),1"}, 4),
        ({"LOCAL_WORLD_SIZE": "x"}, 1),
    ],
)
def test_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch, said: dict[str, str], ranks: int) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert ranks_of_machine() == ranks


class Runtime:
    """What CUDA is asked, by which thread, while which device was set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answer = 0
        self.set: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        properties = type("Properties", (), {"pci_domain_id": 0, "pci_bus_id": 59, "pci_device_id": 0})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(cuda_module, "processors_near", lambda address: self.calls.append((address,)) or ())

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Any:
        self.set.append(device)
        yield
        self.set.pop()

    def cudaHostRegister(self, *asked: int) -> int:  # noqa: N802
        return self._told("register", *asked)

    def cudaHostUnregister(self, *asked: int) -> int:  # noqa: N802
        return self._told("unregister", *asked)

    def _told(self, *call: Any) -> int:
        self.calls.append((*call, threading.current_thread().name, *self.set))
        return self.answer


def test_memory_is_registered_where_it_is_and_unregistered_by_threads_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime, memory = Runtime(monkeypatch), mmap.mmap(-1, 8192)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    unlock = Cuda().lock(memory, GPU)
    unlock()
    assert runtime.calls == [
        ("0000:3b:00.0",),
        ("register", address, 8192, 1, "shardckpt-lock", GPU),
        ("unregister", address, "shardckpt-lock", GPU),
    ]


def test_what_is_beyond_the_share_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, memory = Runtime(monkeypatch), mmap.mmap(-1, 8192)
    monkeypatch.setattr(cuda_module, "lockable_nbytes", lambda ranks: 10_000 * ranks)
    devices = Cuda(1)
    unlock = devices.lock(memory, GPU)
    with pytest.raises(OSError, match=r"share of half of the free memory \(1 ranks here\)"):
        devices.lock(memory, GPU)
    unlock()
    devices.lock(memory, GPU)()
    runtime.answer = 2
    with pytest.raises(OSError, match="cudaHostRegister failed: CUDA error 2"):
        devices.lock(memory, GPU)
    runtime.answer = 0
    devices.lock(memory, GPU)()  # what failed does not count


def test_without_cuda_nothing_is_asked() -> None:
    assert Cuda().place_of(torch.ones(1)) is None
    assert Cuda().are_used is torch.cuda.is_initialized()
