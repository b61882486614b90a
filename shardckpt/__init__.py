"""A distributed-first sharded checkpoint engine for PyTorch.

The public names are loaded when they are first used: `import shardckpt` by itself imports neither torch nor fsspec,
so that commands which only list or check start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardckpt.engine.background.manners import Manners as Manners
    from shardckpt.engine.background.policy import SavePolicy as SavePolicy
    from shardckpt.engine.dcp.reader import DcpReader as DcpReader
    from shardckpt.engine.dcp.writer import DcpWriter as DcpWriter
    from shardckpt.engine.events.kinds import Committed as Committed
    from shardckpt.engine.events.kinds import Deleted as Deleted
    from shardckpt.engine.events.kinds import Event as Event
    from shardckpt.engine.events.kinds import Loaded as Loaded
    from shardckpt.engine.events.kinds import Measured as Measured
    from shardckpt.engine.events.kinds import SaveFailed as SaveFailed
    from shardckpt.engine.events.kinds import SaveOver as SaveOver
    from shardckpt.engine.events.kinds import SaveSkipped as SaveSkipped
    from shardckpt.engine.events.kinds import SaveStarted as SaveStarted
    from shardckpt.engine.events.kinds import Staged as Staged
    from shardckpt.engine.events.kinds import StopAgreed as StopAgreed
    from shardckpt.engine.events.kinds import SubscriberFailed as SubscriberFailed
    from shardckpt.engine.events.kinds import Written as Written
    from shardckpt.engine.events.savelog import SaveLog as SaveLog
    from shardckpt.engine.events.trace import Trace as Trace
    from shardckpt.engine.loading.selecting.policy import LoadPolicy as LoadPolicy
    from shardckpt.engine.loading.selecting.report import LoadPlan as LoadPlan
    from shardckpt.engine.pending import CheckpointInfo as CheckpointInfo
    from shardckpt.engine.pending import PendingSave as PendingSave
    from shardckpt.engine.progress import OtherRank as OtherRank
    from shardckpt.engine.progress import Phase as Phase
    from shardckpt.engine.progress import SaveReport as SaveReport
    from shardckpt.errors import CheckpointDamagedError as CheckpointDamagedError
    from shardckpt.errors import CheckpointDeleteError as CheckpointDeleteError
    from shardckpt.errors import CheckpointError as CheckpointError
    from shardckpt.errors import CheckpointLoadError as CheckpointLoadError
    from shardckpt.errors import CheckpointMismatchError as CheckpointMismatchError
    from shardckpt.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from shardckpt.errors import CheckpointSaveError as CheckpointSaveError
    from shardckpt.errors import CheckpointSkippedError as CheckpointSkippedError
    from shardckpt.errors import CommitUnknownError as CommitUnknownError
    from shardckpt.errors import Failure as Failure
    from shardckpt.errors import GangError as GangError
    from shardckpt.errors import InvalidOperationError as InvalidOperationError
    from shardckpt.errors import InvalidStateError as InvalidStateError
    from shardckpt.errors import RootNotSharedError as RootNotSharedError
    from shardckpt.gang.gangs import Gangs as Gangs
    from shardckpt.integrations.data.sampler import ResumableSampler as ResumableSampler
    from shardckpt.manager.checkpoints import CheckpointManager as CheckpointManager
    from shardckpt.run.choosing.due import SaveEvery as SaveEvery
    from shardckpt.run.choosing.due import SaveRule as SaveRule
    from shardckpt.run.choosing.parts import Parts as Parts
    from shardckpt.run.choosing.progress import TrainingProgress as TrainingProgress
    from shardckpt.run.prune import Fate as Fate
    from shardckpt.run.registry.config import Difference as Difference
    from shardckpt.run.registry.one import Run as Run
    from shardckpt.run.registry.runs import Runs as Runs
    from shardckpt.run.retention import KeepAll as KeepAll
    from shardckpt.run.retention import KeepBest as KeepBest
    from shardckpt.run.retention import KeepEvery as KeepEvery
    from shardckpt.run.retention import KeepLast as KeepLast
    from shardckpt.run.retention import PreserveModel as PreserveModel
    from shardckpt.split import Split as Split
    from shardckpt.split import TensorSplit as TensorSplit
    from shardckpt.streams import RngState as RngState
    from shardckpt.tools.average import AverageReport as AverageReport
    from shardckpt.tools.average import average as average
    from shardckpt.tools.convert import ConvertReport as ConvertReport
    from shardckpt.tools.convert import convert as convert
    from shardckpt.tools.export import ExportReport as ExportReport
    from shardckpt.tools.export import export as export
    from shardckpt.tools.merging.lora import merge_lora as merge_lora
    from shardckpt.tools.moving.writing.told import Means as Means
    from shardckpt.tools.repair import RepairReport as RepairReport
    from shardckpt.tools.repair import repair as repair
    from shardckpt.tools.report import RunReport as RunReport
    from shardckpt.tools.report import StepReport as StepReport
    from shardckpt.tools.verify import verify as verify

    __version__: str

_HOME = {
    "AverageReport": "tools.average",
    "CheckpointDamagedError": "errors",
    "CheckpointDeleteError": "errors",
    "CheckpointError": "errors",
    "CheckpointInfo": "engine.pending",
    "CheckpointLoadError": "errors",
    "CheckpointManager": "manager.checkpoints",
    "CheckpointMismatchError": "errors",
    "CheckpointNotFoundError": "errors",
    "CheckpointSaveError": "errors",
    "CheckpointSkippedError": "errors",
    "CommitUnknownError": "errors",
    "Committed": "engine.events.kinds",
    "ConvertReport": "tools.convert",
    "DcpReader": "engine.dcp.reader",
    "DcpWriter": "engine.dcp.writer",
    "Deleted": "engine.events.kinds",
    "Difference": "run.registry.config",
    "Event": "engine.events.kinds",
    "ExportReport": "tools.export",
    "Failure": "errors",
    "Fate": "run.prune",
    "GangError": "errors",
    "Gangs": "gang.gangs",
    "InvalidOperationError": "errors",
    "InvalidStateError": "errors",
    "KeepAll": "run.retention",
    "KeepBest": "run.retention",
    "KeepEvery": "run.retention",
    "KeepLast": "run.retention",
    "LoadPlan": "engine.loading.selecting.report",
    "LoadPolicy": "engine.loading.selecting.policy",
    "Loaded": "engine.events.kinds",
    "Manners": "engine.background.manners",
    "Means": "tools.moving.writing.told",
    "Measured": "engine.events.kinds",
    "OtherRank": "engine.progress",
    "Parts": "run.choosing.parts",
    "PendingSave": "engine.pending",
    "Phase": "engine.progress",
    "PreserveModel": "run.retention",
    "RepairReport": "tools.repair",
    "ResumableSampler": "integrations.data.sampler",
    "RngState": "streams",
    "RootNotSharedError": "errors",
    "Run": "run.registry.one",
    "RunReport": "tools.report",
    "Runs": "run.registry.runs",
    "SaveEvery": "run.choosing.due",
    "SaveFailed": "engine.events.kinds",
    "SaveLog": "engine.events.savelog",
    "SaveOver": "engine.events.kinds",
    "SavePolicy": "engine.background.policy",
    "SaveReport": "engine.progress",
    "SaveRule": "run.choosing.due",
    "SaveSkipped": "engine.events.kinds",
    "SaveStarted": "engine.events.kinds",
    "Split": "split",
    "Staged": "engine.events.kinds",
    "StepReport": "tools.report",
    "StopAgreed": "engine.events.kinds",
    "SubscriberFailed": "engine.events.kinds",
    "TensorSplit": "split",
    "Trace": "engine.events.trace",
    "TrainingProgress": "run.choosing.progress",
    "Written": "engine.events.kinds",
    "average": "tools.average",
    "convert": "tools.convert",
    "export": "tools.export",
    "merge_lora": "tools.merging.lora",
    "repair": "tools.repair",
    "verify": "tools.verify",
}
"""Public name -> the module of this package that defines it; tests/house checks it against the imports above."""

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    """Import a public name at its first use (PEP 562); the module keeps it afterwards."""
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("shardckpt")
    elif name in _HOME:
        value = getattr(import_module(f"shardckpt.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'shardckpt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "__version__"})
