"""The engines that are compared, each behind the same few calls.

Every rank of a job has an engine of its own and calls it in step with the others. A step is saved once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from benchmarks.engines.seam import AsyncEngine, Engine, Started, sync, sync_all
from benchmarks.places import Place
from benchmarks.states import State

__all__ = ["ENGINES", "AsyncEngine", "Engine", "Entry", "Started", "sync", "sync_all"]


@dataclass(frozen=True, slots=True)
class Entry:
    """How an engine is made, and what it takes part in."""

    make: Callable[[State, Place, bool], Engine]
    """Given the state, where to save, and whether what is saved is to be durable."""
    measures: frozenset[str]
    package: str = "torch"
    anywhere: bool = False
    """It saves to any fsspec URL, and not only to folders."""
    synced: str = "all"
    """What of an asynchronous save to a folder is on the device when the engine calls it done."""

    @property
    def missing(self) -> str | None:
        """The package that has to be installed first."""
        return None if find_spec(self.package) else self.package


def _made_by(name: str, **options: object) -> Callable[[State, Place, bool], Engine]:
    """An engine of the module and class "module.Class", which is imported when it is made."""

    def make(state: State, place: Place, durable: bool) -> Engine:
        module, _, kind = name.partition(".")
        made: Engine = getattr(import_module(f"{__name__}.{module}"), kind)(state, place, durable=durable, **options)
        return made

    return make


_FILES = frozenset({"save", "cached", "load", "cold", "own"})
_ANY_MESH = _FILES | {"reshard"}
_ASYNC = frozenset({"stall", "loop"})
_LOADS = frozenset({"save", "load", "cold", "reshard"})


def _dcp_async(kind: str, *, keep: bool = False, anywhere: bool = False) -> Entry:
    make = _made_by("dcp.DcpAsync", kind=kind, keep=keep)
    return Entry(make, _ASYNC, anywhere=anywhere, synced="files, not folders")


ENGINES: Mapping[str, Entry] = {
    "shardckpt": Entry(_made_by("ours.Shardckpt"), _ANY_MESH | _ASYNC, anywhere=True),
    "shardckpt, in place": Entry(_made_by("ours.Shardckpt", in_place=True), _LOADS, anywhere=True),
    "torch.save": Entry(_made_by("rankfiles.TorchSave"), _FILES, anywhere=True),
    "safetensors": Entry(_made_by("rankfiles.Safetensors"), _FILES, "safetensors", anywhere=True),
    "dcp.save": Entry(_made_by("dcp.Dcp"), _ANY_MESH, anywhere=True),
    "dcp.save, 2 threads": Entry(_made_by("dcp.Dcp", threads=2), _ANY_MESH, anywhere=True),
    "dcp.async_save, thread": _dcp_async("thread", anywhere=True),
    "dcp.async_save, process": _dcp_async("process", anywhere=True),
    "dcp.async_save, thread, stager kept": _dcp_async("thread", keep=True),
    "dcp.async_save, process, stager kept": _dcp_async("process", keep=True),
    "torch_checkpointing": Entry(_made_by("peers.TorchCheckpointing"), _ANY_MESH, "torch_checkpointing"),
    "torch_checkpointing, async": Entry(
        _made_by("peers.TorchCheckpointing", asynchronous=True), _ASYNC, "torch_checkpointing", synced="nothing"
    ),
    "torchsnapshot": Entry(_made_by("peers.TorchSnapshot"), _FILES | _ASYNC, "torchsnapshot", synced="nothing"),
}
"""By the name that `--engines` takes."""
