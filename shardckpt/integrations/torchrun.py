"""Under torchrun: an error that no restart mends ends torchrun, too, which would start the program again and again."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import TracebackType

from shardckpt.errors import (
    CheckpointError,
    CheckpointMismatchError,
    GangError,
    InvalidOperationError,
    InvalidStateError,
    RootNotSharedError,
)
from shardckpt.integrations.frameworks import FrameworkMissingError
from shardckpt.manager.finding import ModelOnlyError

_log = logging.getLogger(__name__)

_OURS = (RootNotSharedError, CheckpointMismatchError, InvalidStateError, InvalidOperationError)
_NAMES = {
    *(kind.__name__ for kind in (*_OURS, ModelOnlyError, ImportError, ModuleNotFoundError, FrameworkMissingError)),
    # Of a root: a bucket or a folder that is not there, or a file in its place. Not `PermissionError`, as which expired
    # credentials come: a program that is started anew may find new ones.
    *(kind.__name__ for kind in (FileNotFoundError, NotADirectoryError)),
}
"""What each of the ranks that failed must have met."""
_AGENTS = (b"torchrun", b"torch.distributed", b"torch/distributed", b"accelerate")
_TURN_S = 0.3
"""Between the ranks of a node, so that one of them ends torchrun, and torchrun the others."""


def end_torchrun_if_hopeless(*, note: str | os.PathLike[str] | None = None) -> None:
    """From now on: an error by which this program ends, and which would come again in each life of it (see
    `is_permanent`), ends the torchrun of this node as well, with status 1, however many restarts are left.

    On several nodes each rank ends its own node's, for all have the same error. Without torchrun nothing is done. On
    Linux, where torchrun is found in /proc. Called once, by every rank, at the beginning of the program.

    Args:
        note: a file into which the error is put, for whatever would start torchrun again.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        if is_permanent(error):
            _end(error, note)

    sys.excepthook = hook


def is_permanent(error: BaseException) -> bool:
    """Whether it would come again, started anew with the same arguments, on the same machines, by as many ranks.

    So it is if the root is not shared, the state does not fit or cannot be stored, methods are called out of turn, a
    package is missing, or where all ranks that failed found that there is no such bucket or folder. Errors of
    connections, rights, deadlines, damaged files, absent ranks, and what is not ours are not.
    """
    if isinstance(error, GangError):
        kinds = {failure.kind for failure in error.failures.values()}
        return not error.absent and bool(kinds) and kinds <= _NAMES
    if isinstance(error, (*_OURS, ImportError)):
        return True
    cause = error.__cause__
    return isinstance(error, CheckpointError) and isinstance(cause, GangError) and is_permanent(cause)


def _end(error: BaseException, note: str | os.PathLike[str] | None) -> None:
    from torch.distributed import get_node_local_rank, is_torchelastic_launched

    if not is_torchelastic_launched() or (agent := _agent()) is None:
        return
    time.sleep(get_node_local_rank(0) * _TURN_S)
    if note is not None:
        Path(note).write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
    _log.critical("no restart mends this: torchrun (process %d) is told to end", agent)
    os.kill(agent, signal.SIGTERM)


def _agent(processes: Path = Path("/proc")) -> int | None:
    """The process of torchrun: the nearest above this one that has not what torchrun gives to those that it starts."""
    number = os.getpid()
    try:
        while number > 1:
            # The name, in parentheses, may hold anything; then come the state and the parent.
            number = int((processes / str(number) / "stat").read_bytes().rpartition(b")")[2].split()[1])
            given = (processes / str(number) / "environ").read_bytes().split(b"\0")
            if not any(variable.startswith(b"TORCHELASTIC_RUN_ID=") for variable in given):
                command = (processes / str(number) / "cmdline").read_bytes()
                return number if any(name in command for name in _AGENTS) else None
    except (OSError, ValueError, IndexError):
        return None
    return None
