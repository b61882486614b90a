"""What is left over when a process dies on the way, of a save or of a deletion: which of it may go, and its removal.

All of it runs on rank 0 only, in any one thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.checksum import crc32
from shardckpt.format.layout import MANIFEST, Aside, is_attempt, parse_aside, parse_step, step_folder
from shardckpt.format.manifest import decode_manifest
from shardckpt.run.catalog import Catalog, Entry, read_record
from shardckpt.run.deletion import is_doomed, remove_folder
from shardckpt.run.requests import each
from shardckpt.run.shared.sweeping import tidy_blobs
from shardckpt.storage.base import RenamingStorage, SharedPuts, Storage, UploadId
from shardckpt.storage.objects.probe import is_probe

_log = logging.getLogger(__name__)

_TURNS = 16
"""On object stores, a step in which there is its own attempt and no other is looked into once in so many looks."""

_Content = tuple[tuple[str, int], ...]
"""Names and sizes of the files of a folder."""
_Upload = tuple[str, UploadId]
"""The key, and the id."""


class DeadAttempts:
    """Sweeps attempts of jobs that died: `step_N.<attempt>.tmp`, or on object stores `step_N/<attempt>` with uploads
    that were never finished. On the save thread, after commits.

    They are found by watching that nothing happens to them any more.

    An attempt may belong to another job that is alive. So it is taken for dead only if this process has seen it twice,
    at least `grace` apart by its own monotonic clock, with the same files of the same sizes: a live gang gives up an
    attempt on which nothing happens long before. Modification times, which jump with clocks, decide nothing. A job
    shorter than `grace` sweeps nothing; the next one may. Object stores, where a look takes requests, are looked at
    four times in that time, and steps with nothing of that kind in them more rarely. The small objects by which a
    storage probes its server go by the same rule.
    """

    def __init__(self, catalog: Catalog, *, grace: timedelta, clock: Callable[[], float] = time.monotonic) -> None:
        self._catalog = catalog
        self._grace_s = grace.total_seconds()
        self._clock = clock
        self._seen: dict[str, tuple[float, _Content]] = {}
        self._probes: dict[str, float] = {}
        self._looked = float("-inf")
        self._looks = 0
        self._tidy: dict[str, int] = {}
        """The steps that had nothing but their own, and in which look that was."""

    def tidy(self) -> list[str]:
        """Look, remember, and sweep what has not changed for long enough; gives the folders that are gone."""
        now, still, dead = self._clock(), {}, {}
        if now - self._looked < self._grace_s / 4 and not isinstance(self._catalog.storage, RenamingStorage):
            return []
        self._looked = now
        names, uploads = self._catalog.storage.list(), _uploads(self._catalog.storage)
        self._tidy_probes(names, uploads, now)
        for attempt in self._attempts(names, uploads):
            try:
                content = self._content(attempt)
            except OSError as error:  # another user's, say: it must not keep the others from being looked at
                _log.warning("what is in %s/%s cannot be told: %s", self._catalog.storage.url, attempt.folder, error)
                continue
            since, known = self._seen.get(attempt.folder, (now, content))
            still[attempt.folder] = (since if known == content else now, content)
            if now - still[attempt.folder][0] >= self._grace_s and known == content and attempt.folder in self._seen:
                dead[attempt.attempt] = attempt.step
        self._seen = still
        swept = sweep(self._catalog, own_attempts=dead) if dead else []
        for folder in swept:
            _log.info("removed %s, left by a save that never committed", folder)
        if swept:
            tidy_blobs(self._catalog.storage)
        return swept

    def _tidy_probes(self, names: Sequence[str], uploads: Sequence[_Upload], now: float) -> None:
        """Delete the probes that have been there for long enough: who made them is dead, or could not delete them."""
        storage, known = self._catalog.storage, self._probes
        self._probes = {name: known.get(name, now) for name in (*names, *dict(uploads)) if is_probe(name)}
        for name, since in self._probes.items():
            if name in known and now - since >= self._grace_s:
                for key, upload in uploads:
                    if key == name and isinstance(storage, SharedPuts):
                        storage.abort_upload(key, upload)
                try:
                    storage.delete([name])
                except OSError as error:
                    _log.warning("the probe %s/%s could not be removed: %s", storage.url, name, error)

    def _attempts(self, names: Sequence[str], uploads: Sequence[_Upload]) -> Iterable[_Attempt]:
        """All that may be leftovers, as far as names tell: those of the entries of the root, and of the uploads."""
        storage = self._catalog.storage
        if isinstance(storage, RenamingStorage):
            asides = [parse_aside(name) for name in names if name.endswith("/")]
            return [_Attempt(a.step, a.attempt, a.folder) for a in asides if a is not None and a.kind == "tmp"]
        found = {_Attempt.of(key.split("/")): None for key, _ in uploads}
        self._looks += 1
        steps = [name for name in names if name.endswith("/") and parse_step(name) is not None]
        due = [name for name in steps if self._looks - self._tidy.get(name, -_TURNS) >= _TURNS]
        known, self._tidy = self._tidy, {name: self._tidy[name] for name in set(steps).difference(due)}
        for folder, inside in zip(due, each(storage.list, due), strict=True):
            attempts = [name for name in inside if name.endswith("/")]
            if len(attempts) > 1 or MANIFEST not in inside:  # else it is the one of the record
                found |= {_Attempt.of([folder.rstrip("/"), name.rstrip("/"), ""]): None for name in attempts}
            else:
                # The first time at a look of its own, so that not all are due again in one.
                self._tidy[folder] = self._looks - (0 if folder in known else crc32(folder.encode()) % _TURNS)
        return [attempt for attempt in found if attempt is not None]

    def _content(self, attempt: _Attempt) -> _Content:
        """What lies in it now; what goes away under our eyes is no content."""
        storage, folder, found = self._catalog.storage, attempt.folder, []
        for name in storage.list(folder):
            try:
                found.append((name, 0 if name.endswith("/") else storage.size(f"{folder}/{name}")))
            except FileNotFoundError:
                continue
        return (*found, *((upload, 0) for _, upload in _uploads(storage, folder)))


@dataclass(frozen=True, slots=True)
class _Attempt:
    """An attempt that may be a leftover."""

    step: int
    attempt: str
    folder: str

    @staticmethod
    def of(parts: Sequence[str]) -> _Attempt | None:
        """Of the parts of a key on an object store; None if it is in no attempt."""
        step = parse_step(parts[0])
        if step is None or len(parts) < 3 or not is_attempt(parts[1]):
            return None
        return _Attempt(step, parts[1], f"{parts[0]}/{parts[1]}")


def _uploads(storage: Storage, folder: str = "") -> list[_Upload]:
    """The uploads that were not finished. A key has several where the answer to its beginning was lost."""
    return list(storage.list_uploads(folder)) if isinstance(storage, SharedPuts) else []


def sweep(catalog: Catalog, *, own_attempts: Mapping[str, int]) -> list[str]:
    """Delete leftovers that are provably ours and not in force; give the folders deleted.

    `own_attempts`: attempt id to step, for attempts that this very process drew, that failed, and whose writing threads
    on this rank have ended. Not those whose commit ended unknown. Deleted are, besides the folders of these:

    - what a deletion had begun to remove (`step_N.deleted*.old` without a record);
    - a committed step that was set aside (`.old`), or was exchanged with another attempt and so lies in the `.tmp`
      folder of that one, while `step_N` itself is in force.

    Everything else stays: attempts with ids unknown here (another gang may be writing them), folders without a record
    that are not known to be ours, foreign names. They are harmless, but take space; rules that go by age belong to a
    command that a person calls. What cannot be deleted now is logged and left for the next time.
    """
    storage = catalog.storage
    swept: list[str] = []
    for folder in _leftovers(catalog, own_attempts):
        try:
            _remove_leftover(storage, folder)
        except OSError as error:
            _log.warning("the leftover %s/%s could not be removed: %s", storage.url, folder, error)
        else:
            swept.append(folder)
    return swept


def _leftovers(catalog: Catalog, own_attempts: Mapping[str, int]) -> list[str]:
    """The folders that `sweep` may remove."""
    storage = catalog.storage
    try:
        if isinstance(storage, RenamingStorage):
            asides = [aside for name in storage.list() if name.endswith("/") and (aside := parse_aside(name))]
            return [aside.folder for aside in asides if _is_leftover(catalog, aside, own_attempts)]
        return [
            f"{step_folder(step)}/{attempt}"
            for attempt, step in own_attempts.items()
            if not _is_named(catalog, step, attempt)
        ]
    except OSError as error:
        raise CheckpointLoadError(f"cannot look for leftovers in {storage.url}: {error}") from error


def _is_leftover(catalog: Catalog, aside: Aside, own_attempts: Mapping[str, int]) -> bool:
    """Whether a folder beside the steps of a file system is ours and not in force.

    Its name was seen before anything else is looked at here. So if it was made by a replacement under way, the step's
    old folder has been renamed by then, and a record found under the step's own name is the new one's: this order
    makes it safe to sweep beside a gang that is replacing the step.
    """
    try:
        manifest = read_record(catalog.storage, Entry(aside.step, aside.folder, aside.folder))
    except CheckpointNotFoundError:
        return is_doomed(aside) or (aside.kind == "tmp" and aside.attempt in own_attempts)
    except CheckpointDamagedError:
        return aside.kind == "tmp" and aside.attempt in own_attempts and _never_finished(catalog, aside)
    except CheckpointLoadError:
        return False  # unreadable now: for a person to judge
    if aside.kind == "tmp" and manifest.attempt == aside.attempt:
        return aside.attempt in own_attempts  # it had written its record, and failed at the rename
    return _is_in_force(catalog, aside.step)


def _never_finished(catalog: Catalog, aside: Aside) -> bool:
    """Whether a dead attempt has a record that was never wholly written: a power cut came before it was synced.

    A whole record of another step was put there by a person. And the folder may hold a step that was exchanged with
    the attempt: it stays while a damaged record lies under the step's own name, for then it may be all that there is.
    """
    try:
        decode_manifest(catalog.storage.read(f"{aside.folder}/{MANIFEST}"))
    except ValueError:
        folder = step_folder(aside.step)
        return MANIFEST not in catalog.storage.list(folder) or _is_in_force(catalog, aside.step)
    except OSError:
        return False
    return False


def _is_in_force(catalog: Catalog, step: int) -> bool:
    """Whether the folder with the step's own name has a sound record."""
    folder = step_folder(step)
    try:
        read_record(catalog.storage, Entry(step, folder, folder))
    except (CheckpointLoadError, CheckpointNotFoundError):
        return False
    return True


def _is_named(catalog: Catalog, step: int, attempt: str) -> bool:
    """Whether a record on an object store may name files of this attempt. In doubt it does."""
    folder = step_folder(step)
    try:
        return read_record(catalog.storage, Entry(step, folder, folder)).attempt == attempt
    except CheckpointNotFoundError:
        return False
    except CheckpointLoadError:
        return True


def _remove_leftover(storage: Storage, folder: str) -> None:
    if isinstance(storage, RenamingStorage):
        remove_folder(storage, folder)
    else:
        storage.delete_tree(folder)
