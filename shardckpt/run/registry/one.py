"""One run of `Runs`: where it lies, what its run.json says, and the notes that a job adds to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping

from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError, CheckpointSaveError
from shardckpt.run.catalog import Catalog
from shardckpt.run.registry.config import Difference
from shardckpt.run.registry.runfile import RUN_FILE, RunInfo, SavedStep, decode_run, encode_run, now
from shardckpt.storage.base import Storage
from shardckpt.storage.open import open_storage

_log = logging.getLogger(__name__)


class Run:
    """The root of a `CheckpointManager`: give it the run itself, and the run's history is kept in its run.json.

    Each rank has its own; nothing is held open.
    """

    def __init__(
        self,
        root: str,
        folder: str,
        *,
        info: RunInfo,
        differences: tuple[Difference, ...] = (),
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        self.root = root
        """The path or URL, as it was given: perhaps with credentials, so not for logs."""
        self.folder = folder
        self.info = info
        """As it was when the run was made or opened."""
        self.differences = differences
        """What this job's configuration has otherwise than the one before."""
        self.storage_options = storage_options

    def __repr__(self) -> str:
        return f"Run({self.folder!r}, name={self.info.name!r})"

    @property
    def number(self) -> int:
        return self.info.number

    @property
    def name(self) -> str:
        return self.info.name

    def open_storage(self) -> Storage:
        """The storage at the run's root, for the caller to close."""
        return open_storage(self.root, storage_options=self.storage_options)

    def look(self) -> RunInfo:
        """What run.json says now: the history with all steps so far. By any rank by itself."""
        storage = self.open_storage()
        try:
            return read_run(storage, "")
        finally:
            storage.close()

    def best(self, metric: str = "score", *, lower_better: bool = False) -> SavedStep | None:
        """The best step that is still there, by what the history says of it; of equal ones the later. None if no step
        that is there has the metric. By any rank by itself."""
        storage = self.open_storage()
        try:
            return best_of(read_run(storage, ""), Catalog(storage).steps(), metric, lower_better=lower_better)
        finally:
            storage.close()


def best_of(info: RunInfo, there: Collection[int], metric: str, *, lower_better: bool) -> SavedStep | None:
    """The best of the steps that are there, by what the history says; of equal ones the later."""
    measured = [saved for saved in info.history if saved.step in there and metric in saved.metrics]
    sign = -1 if lower_better else 1
    return max(measured, key=lambda saved: (sign * saved.metrics[metric], saved.step), default=None)


class Journal:
    """Writes the history of a run into its run.json. On rank 0, by any thread.

    A failure is logged and harms nobody: the file decides nothing. Each note reads the file anew, so that what another
    job has put down meanwhile stays.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()

    def committed(self, step: int, *, created: str = "", nbytes: int = 0, metrics: Mapping[str, float]) -> None:
        """A step was committed."""
        self._note(lambda info: info.with_step(SavedStep(step, created or now(), nbytes, dict(metrics))))

    def measured(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step that was committed before has got these metrics."""
        self._note(lambda info: info.with_metrics(step, metrics))

    def _note(self, change: Callable[[RunInfo], RunInfo]) -> None:
        try:
            with self._lock:
                write_run(self._storage, "", change(read_run(self._storage, "")))
        except (CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError, CheckpointSaveError) as error:
            _log.warning("the history of the run lacks an entry: %s", error)


def read_run(storage: Storage, folder: str) -> RunInfo:
    """The run.json in a folder ("" is the root). `CheckpointNotFoundError`, `CheckpointDamagedError`, or
    `CheckpointLoadError` where it cannot be read now."""
    key = _key(folder)
    where = f"{storage.url.rstrip('/')}/{key}"
    try:
        return decode_run(storage.read(key))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"there is no {where}: it is not a run made by Runs") from error
    except OSError as error:
        raise CheckpointLoadError(f"{where} cannot be read now: {error}") from error
    except ValueError as error:
        raise CheckpointDamagedError(f"{where} is damaged, or was never wholly written: {error}") from error


def write_run(storage: Storage, folder: str, info: RunInfo) -> None:
    """Put another run.json in the place of the one that is there, atomically."""
    try:
        storage.replace(_key(folder), encode_run(info))
    except OSError as error:
        raise CheckpointSaveError(f"{_key(folder)} in {storage.url} was not written: {error}") from error


def _key(folder: str) -> str:
    return f"{folder}/{RUN_FILE}" if folder else RUN_FILE
