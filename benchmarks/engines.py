"""The engines that are compared, each behind the same few calls.

Every rank of a job has an engine of its own and calls it in step with the others. A step is saved once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import shardckpt as sc
from benchmarks.states import State


class Engine(Protocol):
    """Saves so that the bytes are on the device when it returns, and loads so that the state holds them."""

    def save(self, step: int) -> None: ...

    def load(self, step: int) -> None: ...

    def folder(self, step: int) -> Path:
        """Where the files of a step lie."""

    def phases(self) -> Mapping[str, float]:
        """What the engine itself says of its last save, in seconds; empty if it says nothing."""

    def close(self) -> None: ...


class Started(Protocol):
    """An asynchronous save under way."""

    def before_update(self) -> None:
        """Called before the optimizer step: returns when the state may change."""

    def result(self) -> None:
        """Returns when everything is written."""


class AsyncEngine(Engine, Protocol):
    """One that can also save while training goes on."""

    def start(self, step: int) -> Started: ...


class Shardckpt:
    """This project: every save is asynchronous and durable; a synchronous one waits for its result."""

    def __init__(self, state: State, root: Path) -> None:
        self._state = state.live
        self._root = root
        self._manager = sc.CheckpointManager(root)
        self._last: sc.PendingSave | None = None

    def start(self, step: int) -> Started:
        self._last = self._manager.save(step, self._state)
        return _OwnSave(self._last)

    def save(self, step: int) -> None:
        self.start(step).result()

    def load(self, step: int) -> None:
        self._manager.load(step, self._state)

    def folder(self, step: int) -> Path:
        return self._root / f"step_{step}"

    def phases(self) -> Mapping[str, float]:
        if self._last is None:
            return {}
        report = self._last.report
        return {name: getattr(report, f"{name}_s") for name in ("stall", "stage", "write", "commit", "total")}

    def close(self) -> None:
        self._manager.close()


class _OwnSave:
    def __init__(self, pending: sc.PendingSave) -> None:
        self._pending = pending

    def before_update(self) -> None:
        self._pending.staged()

    def result(self) -> None:
        self._pending.result()


class _Peer:
    """What the peers have in common: a dict of tensors, a folder for each step."""

    def __init__(self, state: State, root: Path) -> None:
        self._state = state
        self._root = root

    def folder(self, step: int) -> Path:
        return self._root / f"step_{step}"

    def phases(self) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        pass


class _PerRankFile(_Peer):
    """One file for each rank, synced with its folder: the least that makes these formats durable."""

    def save(self, step: int) -> None:
        folder = self.folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(self._path(step), dict(self._state.locals()))
        for path in (folder, folder.parent):
            sync(path)

    def load(self, step: int) -> None:
        with torch.no_grad():
            self._read(self._path(step), dict(self._state.locals()))

    def _path(self, step: int) -> Path:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return self.folder(step) / f"rank_{rank}"

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def _read(self, path: Path, into: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError


class TorchSave(_PerRankFile):
    """`torch.save`; loaded by `torch.load(mmap=True)` and a copy, the quickest way it has."""

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        with open(path, "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path, into: dict[str, torch.Tensor]) -> None:
        loaded = torch.load(path, mmap=True, weights_only=True)
        for name, tensor in into.items():
            tensor.copy_(loaded[name])


class Safetensors(_PerRankFile):
    """safetensors' `save_file`, and its mapped tensors copied to their places."""

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        save_file({name: tensor.detach() for name, tensor in tensors.items()}, path)
        sync(path)

    def _read(self, path: Path, into: dict[str, torch.Tensor]) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            for name, tensor in into.items():
                tensor.copy_(file.get_tensor(name))


class Dcp(_Peer):
    """`dcp.save` and `dcp.load`, with as many writer threads as asked for; it syncs its files by itself."""

    def __init__(self, state: State, root: Path, *, threads: int = 1) -> None:
        super().__init__(state, root)
        self._threads = threads

    def save(self, step: int) -> None:
        writer = FileSystemWriter(self.folder(step), thread_count=self._threads)
        dcp_save(self._state.tensors, storage_writer=writer)

    def load(self, step: int) -> None:
        dcp_load(self._state.tensors, checkpoint_id=self.folder(step))


class DcpAsync(Dcp):
    """`dcp.async_save`, by a thread or a process; with a stager that is kept, its memory is touched only once."""

    def __init__(self, state: State, root: Path, *, kind: AsyncCheckpointerType, keep: bool = False) -> None:
        super().__init__(state, root)
        self._kind = kind
        shared = kind is AsyncCheckpointerType.PROCESS
        self._stager = DefaultStager(StagingOptions(False, shared, False, False)) if keep else None
        if not dist.is_initialized() and kind is AsyncCheckpointerType.PROCESS:
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # where its process looks for this one
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)

    def start(self, step: int) -> Started:
        started = dcp_async_save(
            self._state.tensors,
            checkpoint_id=self.folder(step),
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        assert isinstance(started, Future)
        return _DcpSave(started)

    def save(self, step: int) -> None:
        self.start(step).result()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class _DcpSave:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def before_update(self) -> None:
        """It has been copied before `async_save` returned."""

    def result(self) -> None:
        self._future.result()


@dataclass(frozen=True, slots=True)
class Entry:
    """How an engine is made, and what it takes part in."""

    make: Callable[[State, Path], Engine]
    measures: frozenset[str]
    package: str = "torch"

    @property
    def missing(self) -> str | None:
        """The package that has to be installed first."""
        return None if find_spec(self.package) else self.package


_SYNC = frozenset({"save", "load", "cold", "own"})
_THREAD, _PROCESS = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
ENGINES: Mapping[str, Entry] = {
    "shardckpt": Entry(Shardckpt, _SYNC | {"stall"}),
    "torch.save": Entry(TorchSave, _SYNC),
    "safetensors": Entry(Safetensors, _SYNC, "safetensors"),
    "dcp.save": Entry(Dcp, _SYNC),
    "dcp.save, 2 threads": Entry(lambda state, root: Dcp(state, root, threads=2), _SYNC),
    "dcp.async_save, thread": Entry(lambda state, root: DcpAsync(state, root, kind=_THREAD), frozenset({"stall"})),
    "dcp.async_save, process": Entry(lambda state, root: DcpAsync(state, root, kind=_PROCESS), frozenset({"stall"})),
    "dcp.async_save, thread, stager kept": Entry(
        lambda state, root: DcpAsync(state, root, kind=_THREAD, keep=True), frozenset({"stall"})
    ),
    "dcp.async_save, process, stager kept": Entry(
        lambda state, root: DcpAsync(state, root, kind=_PROCESS, keep=True), frozenset({"stall"})
    ),
}
"""By the name that `--engines` takes."""


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
