"""`torch.distributed.checkpoint`."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Any, Literal

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

from benchmarks.engines.seam import FutureSave, Peer, Started
from benchmarks.places import Place
from benchmarks.states import State


class Dcp(Peer):
    """`dcp.save` and `dcp.load`, with as many writer threads as asked for; it syncs its files by itself."""

    def __init__(self, state: State, root: Place, *, durable: bool, threads: int = 1) -> None:
        super().__init__(state, root, durable=durable)
        self._threads = threads

    def save(self, step: int) -> None:
        save(self._tensors, storage_writer=self._writer(step))

    def load(self, step: int) -> None:
        place = self.place(step)
        reader = FileSystemReader(place.path) if place.is_local else FsspecReader(place.url)
        load(self._tensors, storage_reader=reader)

    def _writer(self, step: int) -> Any:
        place = self.place(step)
        if place.is_local:
            return FileSystemWriter(place.path, thread_count=self._threads, sync_files=self._durable)
        # On object stores there is nothing to sync; asked to, this writer syncs the whole host.
        return FsspecWriter(place.url, thread_count=self._threads, sync_files=False)


class DcpAsync(Dcp):
    """`dcp.async_save`, by a thread or a process; with a stager that is kept, its memory is touched only once."""

    def __init__(
        self, state: State, root: Place, *, durable: bool, kind: Literal["thread", "process"], keep: bool = False
    ) -> None:
        super().__init__(state, root, durable=durable)
        self._kind = AsyncCheckpointerType.PROCESS if kind == "process" else AsyncCheckpointerType.THREAD
        self._stager = DefaultStager(StagingOptions(False, kind == "process", False, False)) if keep else None
        if not dist.is_initialized() and kind == "process":
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # where its process looks for this one
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None  # it plans while training talks

    def start(self, step: int) -> Started:
        started = async_save(
            self._tensors,
            storage_writer=self._writer(step),
            process_group=self._group,
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        assert isinstance(started, Future)
        return FutureSave(started)

    def save(self, step: int) -> None:
        self.start(step).result()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
