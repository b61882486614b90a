"""What others do, recorded and read in the same way: a comparison."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from shardckpt.storage.base import Storage
from shardckpt.testing.crash.judge import on_disk, walk
from shardckpt.testing.crash.operations import Recording
from shardckpt.testing.crash.recorder import Recorder

STEP = 1


def _state(version: int) -> dict[str, Any]:
    return {"weight": torch.arange(600.0) + 1000 * version, "bias": torch.full((3,), float(version))}


def _version(state: dict[str, Any]) -> int:
    version = int(state["bias"][0])
    if not all(torch.equal(value, state[key]) for key, value in _state(version).items()):
        raise ValueError("a mixture")
    return version


def save_in_place(folder: Path, version: int) -> None:
    with open(folder / "checkpoint.pt", "wb") as file:
        torch.save(_state(version), file)


def save_and_rename(folder: Path, version: int, *, sync: bool = False, sync_folder: bool = False) -> None:
    fresh = folder / "checkpoint.pt.tmp"
    with open(fresh, "wb") as file:
        torch.save(_state(version), file)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(fresh, folder / "checkpoint.pt")
    if sync_folder:
        above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(above)
        os.close(above)


def save_by_dcp(folder: Path, version: int) -> None:
    dcp.save(_state(version), checkpoint_id=folder / "checkpoint", no_dist=True)


class FileReader:
    """One file with `torch.save`: it is offered if it is there."""

    def steps(self, storage: Storage) -> list[int]:
        return [STEP] if "checkpoint.pt" in storage.list() else []

    def version(self, storage: Storage, step: int) -> object:
        return _version(torch.load(io.BytesIO(storage.read("checkpoint.pt")), weights_only=True))


class DcpReader:
    """A folder of DCP: it is offered if it has a `.metadata`."""

    def steps(self, storage: Storage) -> list[int]:
        return [STEP] if ".metadata" in storage.list("checkpoint") else []

    def version(self, storage: Storage, step: int) -> object:
        with tempfile.TemporaryDirectory() as place:
            on_disk(walk(storage, "checkpoint"), frozenset({"checkpoint"}), root=Path(place))
            state = _state(0)
            try:
                dcp.load(state, checkpoint_id=Path(place) / "checkpoint", no_dist=True)
            except BaseException as error:  # DCP's own is none of Exception
                raise ValueError(f"{type(error).__name__}: {error}") from None
            return _version(state)


@dataclass(frozen=True)
class Peer:
    """One way to save, twice to the same place, and its reader."""

    save: Callable[[Path, int], None]
    reader: FileReader | DcpReader


PEERS: dict[str, Peer] = {
    "torch.save in place": Peer(save_in_place, FileReader()),
    "torch.save, rename": Peer(save_and_rename, FileReader()),
    "torch.save, fsync, rename": Peer(lambda f, v: save_and_rename(f, v, sync=True), FileReader()),
    "torch.save, fsync, rename, fsync of the folder": Peer(
        lambda f, v: save_and_rename(f, v, sync=True, sync_folder=True), FileReader()
    ),
    "dcp.save": Peer(save_by_dcp, DcpReader()),
}


def record(peer: Peer, folder: Path) -> Recording:
    """Two versions, one after the other."""
    recorder = Recorder(str(folder), streams=True)
    with recorder.watching():
        for version in (1, 2):
            recorder.begun(STEP, version)
            peer.save(folder, version)
            recorder.acknowledged(STEP, version)
    return recorder.recording
