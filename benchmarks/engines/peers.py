"""Packages that have to be installed beside torch (the `bench` extra); they save to folders only."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.engines.seam import FutureSave, Peer, Started, sync_all
from benchmarks.places import Place
from benchmarks.states import State


class TorchCheckpointing(Peer):
    """torch_checkpointing 0.1: a process of its own writes; the copy goes on while training does.

    2026-11: its direct I/O, on by default, fails on ext4 (EINVAL), so it is switched off. It syncs nothing, so its
    files are synced here.
    """

    def __init__(self, state: State, root: Place, *, durable: bool, asynchronous: bool = False) -> None:
        super().__init__(state, root, durable=durable)
        tc = import_module("torch_checkpointing")
        resharder = import_module("torch_checkpointing.default_resharder").DefaultResharder()
        storage = import_module("torch_checkpointing.storage.filesystem").LocalFileSystemStorageConfig
        _gather_without_cuda()
        logging.getLogger("torch_checkpointing").setLevel(logging.ERROR)  # a warning for each plain tensor
        self._manager = tc.CheckpointManager(
            tc.CheckpointManager.Config(
                items={"state": tc.ItemSpec(resharder=resharder)},
                save=tc.AsyncCheckpointSaverConfig() if asynchronous else tc.SyncCheckpointSaverConfig(),
                storage_config=storage(use_direct_io=False),
            )
        )

    def start(self, step: int) -> Started:
        future = self._manager.save(str(self.place(step).path), {"state": self._tensors})
        return _LockedSave(future, self._manager.lock())

    def save(self, step: int) -> None:
        self._manager.save(str(self.place(step).path), {"state": self._tensors})
        if self._durable:
            sync_all(self.place(step))

    def load(self, step: int) -> None:
        with torch.no_grad():
            self._manager.load(str(self.place(step).path), into={"state": self._tensors})

    def close(self) -> None:
        self._manager.close()


def _gather_without_cuda() -> None:
    """2026-11: on several ranks its metadata are gathered through memory of a GPU, and a job without one fails."""
    manager = import_module("torch_checkpointing.metadata_manager").DefaultMetadataManager

    def gather(self: Any, data: Any, process_group: Any = None) -> dict[int, Any]:
        gathered: list[Any] = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(gathered, data, group=process_group)
        return dict(enumerate(gathered))

    if not torch.cuda.is_available():
        manager._all_gather_pickled_data = gather


class _LockedSave(FutureSave):
    """Whoever changes the state takes a lock, which is free once the copy is done."""

    def __init__(self, future: Any, lock: AbstractContextManager[Any]) -> None:
        super().__init__(future)
        self._lock = lock

    def before_update(self) -> None:
        with self._lock:
            pass


class TorchSnapshot(Peer):
    """torchsnapshot 0.1 (2022): knows no DTensor, so each rank's tensors are saved as its own. It syncs nothing."""

    def save(self, step: int) -> None:
        import_module("torchsnapshot").Snapshot.take(str(self.place(step).path), self._state_of_rank())
        if self._durable:
            sync_all(self.place(step))

    def start(self, step: int) -> Started:
        snapshot = import_module("torchsnapshot").Snapshot
        return _Snapshot(snapshot.async_take(str(self.place(step).path), self._state_of_rank()))

    def load(self, step: int) -> None:
        with torch.no_grad():
            import_module("torchsnapshot").Snapshot(str(self.place(step).path)).restore(self._state_of_rank())

    def _state_of_rank(self) -> dict[str, Any]:
        return {"state": import_module("torchsnapshot").StateDict(**dict(self._state.locals()))}


class _Snapshot(FutureSave):
    def result(self) -> None:
        self._future.wait()
