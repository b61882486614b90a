"""`Runs`: a root with numbered runs in it. Numbers are given race-free, also on object stores."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any

from shardckpt.errors import (
    CheckpointDamagedError,
    CheckpointLoadError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    GangError,
    InvalidStateError,
)
from shardckpt.format.layout import MANIFEST, parse_aside, parse_step
from shardckpt.gang.announce import announce
from shardckpt.gang.gangs import Gangs
from shardckpt.run.registry.config import differences, plain_config
from shardckpt.run.registry.one import Run, read_run, write_run
from shardckpt.run.registry.origin import code_version, environment, host
from shardckpt.run.registry.runfile import (
    MOST_SESSIONS,
    RUN_FILE,
    RunInfo,
    Session,
    decode_run,
    encode_run,
    now,
)
from shardckpt.run.registry.summary import RunSummary
from shardckpt.run.requests import each
from shardckpt.storage.base import Storage
from shardckpt.storage.open import open_storage

_log = logging.getLogger(__name__)

_FOLDER = re.compile(r"run_(\d{3,9})")
_TRIES = 1000
"""Numbers that are tried, each of which another job has just taken."""
_KINDS = (CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError, CheckpointSaveError, InvalidStateError)
"""Errors of rank 0 that are of the same kind on every rank."""


class Runs:
    """Runs below a root: `run_001`, `run_002`, ...

    Made and called by all ranks of the job, in the same order, on the training's thread: rank 0 does it, the others are
    told. `close` it, or use it in a `with`.

    >>> import tempfile
    >>> with Runs(tempfile.mkdtemp(), Gangs.local()) as runs:
    ...     run = runs.new(name="first", config={"lr": 0.1})
    ...     run.folder, runs.open("first").info.config
    ('run_001', {'lr': 0.1})

    Args:
        root: a path, or any URL that fsspec opens.
        gangs: the processes that act together; found from the environment if not given.
        timeout: how long a rank waits for its peers.
        storage_options: for fsspec; never logged or recorded.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        gangs: Gangs | None = None,
        *,
        timeout: timedelta = timedelta(minutes=5),
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        self._root = os.fspath(root).rstrip("/") or "/"
        self._options = storage_options
        self._gang = (gangs or Gangs.from_env()).fork("runs").root
        self._timeout = timeout
        self._storage: Storage = open_storage(self._root, storage_options=storage_options)
        self._asked = 0

    def __enter__(self) -> Runs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back connections; the runs that were made or opened are not concerned."""
        self._gang.close()
        self._storage.close()

    def new(
        self,
        *,
        name: str = "",
        config: Any = None,
        number: int | None = None,
        code: str | os.PathLike[str] = ".",
    ) -> Run:
        """Make a run of the next number, or of this one.

        Args:
            name: for people, and for `open`; need not be unique.
            config: a dict, a dataclass or an `argparse.Namespace`; recorded without credentials.
            number: `CheckpointSaveError` if there is a run of this number.
            code: a folder in the git repository whose commit is recorded, if there is one.
        """
        session = self._session(code)

        def make() -> list[Any]:
            info = RunInfo(0, secrets.token_hex(10), name, now(), plain_config(config or {}), (session,))
            folder, info = self._claim(info, number)
            _log.info("this is %s in %s", folder, self._storage.url)
            return [folder, encode_run(info).decode()]

        return self._run(self._from_rank_0(make, "make a run"))

    def open(self, which: int | str = "latest", *, config: Any = None, code: str | os.PathLike[str] = ".") -> Run:
        """A run that is there: by number, by name (of several the newest), by folder, or "latest".

        With `config` this job goes on with the run: it is put down in run.json, and what its configuration has
        otherwise than the one before is logged and in `differences` of the run. Without, nothing is written.
        """
        session = self._session(code) if config is not None else None

        def find() -> list[Any]:
            folder, info = self._find(which)
            if session is not None:
                info = self._go_on(folder, info, plain_config(config), session)
            return [folder, encode_run(info).decode()]

        return self._run(self._from_rank_0(find, f"open run {which}"), going_on=session is not None)

    def list(self) -> list[RunSummary]:
        """All runs, by number, with their committed steps. By any rank by itself; two requests a run, one a step."""
        try:
            return each(self._summary, self._folders())
        except OSError as error:
            raise CheckpointLoadError(f"cannot list the runs in {self._storage.url}: {error}") from error

    def _session(self, code: str | os.PathLike[str]) -> Session:
        if self._gang.rank != 0:
            return Session(now(), "", self._gang.size)  # only that of rank 0 is used
        return Session(now(), host(), self._gang.size, environment(), code_version(code))

    def _claim(self, info: RunInfo, number: int | None) -> tuple[str, RunInfo]:
        """Put a run.json that was not there: of two that try, the storage lets one. On rank 0."""
        first = number if number is not None else 1 + max((parse_run(name) or 0 for name in self._names()), default=0)
        for candidate in range(first, first + (_TRIES if number is None else 1)):
            claimed = replace(info, number=candidate)
            if self._put(run_folder(candidate), claimed):
                return run_folder(candidate), claimed
        if number is not None:
            raise CheckpointSaveError(
                f"there is a run {number} in {self._storage.url} already: open({number}) goes on with it"
            )
        raise CheckpointSaveError(f"no number was free for a new run in {self._storage.url}, of {_TRIES} from {first}")

    def _put(self, folder: str, info: RunInfo) -> bool:
        """False if somebody else has put it before."""
        key = f"{folder}/{RUN_FILE}"
        try:
            self._storage.put(key, [encode_run(info)])
        except FileExistsError:
            return False
        except OSError as error:
            raise CheckpointSaveError(f"cannot make a run in {self._storage.url}: {error}") from error
        return True

    def _find(self, which: int | str) -> tuple[str, RunInfo]:
        folders = [run_folder(which)] if isinstance(which, int) else self._folders()
        if isinstance(which, str) and parse_run(which) is not None:
            folders = [folder for folder in folders if parse_run(folder) == parse_run(which)]
            which = "latest"
        for folder in reversed(folders):
            try:
                info = read_run(self._storage, folder)
            except CheckpointDamagedError as error:
                if isinstance(which, int) or len(folders) == 1:
                    raise
                _log.warning("%s is passed over: %s", folder, error)
                continue
            except CheckpointNotFoundError:
                continue
            if isinstance(which, int) or which in ("latest", info.name):
                return folder, info
        raise CheckpointNotFoundError(f"there is no run {which!r} in {self._storage.url}, but {len(folders)} others")

    def _go_on(self, folder: str, info: RunInfo, config: dict[str, Any], session: Session) -> RunInfo:
        found = differences(info.config, config)
        session = replace(session, differences=found)
        info = replace(info, config=config, sessions=(*info.sessions, session)[-MOST_SESSIONS:])
        if found:
            listed = "".join(f"\n  {difference}" for difference in found)
            _log.warning("%s goes on with a configuration that differs in %d entries:%s", folder, len(found), listed)
        write_run(self._storage, folder, info)
        return info

    def _folders(self) -> Sequence[str]:
        """Those that are called like runs and are some, by number."""
        named = [name[:-1] for name in self._names() if name.endswith("/") and parse_run(name) is not None]
        return sorted(named, key=lambda name: parse_run(name) or 0)

    def _names(self) -> Sequence[str]:
        try:
            return self._storage.list()
        except OSError as error:
            raise CheckpointLoadError(f"cannot list the runs in {self._storage.url}: {error}") from error

    def _summary(self, folder: str) -> RunSummary:
        number, steps = parse_run(folder) or 0, tuple(committed_steps(self._storage, folder))
        try:
            return RunSummary(folder, number, read_run(self._storage, folder), steps)
        except (CheckpointDamagedError, CheckpointNotFoundError) as error:
            return RunSummary(folder, number, None, steps, str(error))

    def _run(self, told: Any, *, going_on: bool = True) -> Run:
        folder, info = str(told[0]), decode_run(str(told[1]).encode())
        where = f"{self._root.rstrip('/')}/{folder}"
        changed = info.sessions[-1].differences if going_on and info.sessions else ()
        return Run(where, folder, info=info, differences=changed, storage_options=self._options)

    def _from_rank_0(self, work: Callable[[], Any], phase: str) -> Any:
        """Rank 0 does it; all get its result, or the same error, of the same kind."""
        self._asked += 1
        self._gang.enter(f"runs/{self._asked}", timeout=self._timeout)
        try:
            return announce(self._gang, work, phase=phase, timeout=self._timeout)
        except GangError as error:
            failure = error.failures.get(0)
            kind = next((kind for kind in _KINDS if failure and kind.__name__ == failure.kind), None)
            if failure is None or kind is None:
                raise
            raise kind(failure.message) from error


def run_folder(number: int) -> str:
    """`run_007`; from 1000 on with as many digits as it needs."""
    if not 1 <= number < 10**9:
        raise InvalidStateError(f"a run has a number from 1 on, not {number}")
    return f"run_{number:03d}"


def parse_run(folder: str) -> int | None:
    """The number in a folder's name, with or without the slash of a listing; None for any other name."""
    match = _FOLDER.fullmatch(folder.rstrip("/"))
    number = int(match[1]) if match else 0
    return number if number and run_folder(number) == folder.rstrip("/") else None


def committed_steps(storage: Storage, folder: str) -> list[int]:
    """The committed steps of the run in this folder of a root, ascending, as its own catalog would list them.

    A step counts by its record, also if it has been moved aside (see `shardckpt.run.catalog`).
    """
    names = [name[:-1] for name in storage.list(folder) if name.endswith("/")]
    found: list[tuple[str, int]] = []
    for name in names:
        aside, step = parse_aside(name), parse_step(name)
        if aside is not None and aside.kind == "old":
            step = aside.step
        if step is not None:
            found.append((f"{folder}/{name}/{MANIFEST}", step))

    def is_there(entry: tuple[str, int]) -> bool:
        try:
            storage.size(entry[0])
        except FileNotFoundError:
            return False
        return True

    there = each(is_there, found)
    return sorted({step for (_, step), yes in zip(found, there, strict=True) if yes})
