"""Copy committed steps from one place to another, of whatever kinds: local, memory, object stores. No torch, no gang.

A step is copied as it is saved: into a folder of its attempt, every file against its digest as it passes, the record
last, by the engine's own commit. So it is whole at its new place, or absent; and what is there already is never
touched. The attempt's id follows from the record alone: whoever copies the same step again finds what an earlier try
has left, keeps the files that are whole, and copies the rest.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from typing import Literal, TypeAlias

from shardckpt.engine.committing.commit import attempt_prefix, commit_attempt
from shardckpt.errors import CheckpointDamagedError, CheckpointNotFoundError, CheckpointSaveError, InvalidOperationError
from shardckpt.format.layout import LAST_STEP, blob_folder, parse_step
from shardckpt.format.manifest import FileEntry, Manifest, encode_manifest
from shardckpt.run.catalog import Catalog, Entry
from shardckpt.run.scores import read_scores, write_score
from shardckpt.storage.base import RenamingStorage, SharedPuts, Storage
from shardckpt.storage.objects.secrecy import redact
from shardckpt.storage.open import open_storage, options_for
from shardckpt.tools.checking.summing import Stretch, sums
from shardckpt.tools.contents import files_below
from shardckpt.tools.copying.alone import LOCK, alone
from shardckpt.tools.copying.files import Way, copy_blob, copy_files
from shardckpt.tools.place import Place, Where, opened

Outcome = Literal["copied", "already there", "another is there", "damaged"]
"""another is there: the target has a step of this number that is not the same; it was not touched. damaged: in the
source, so nothing of it is offered at the target."""

Told: TypeAlias = Callable[[int, int, int], None]
"""Called with the step, the bytes of it that have just been copied or found, and its bytes in all; by any thread."""


@dataclass(frozen=True, slots=True)
class CopiedStep:
    """What became of one step."""

    step: int
    outcome: Outcome
    what: str = ""
    """For people, where there is something to be said."""
    files: int = 0
    nbytes: int = 0
    copied_nbytes: int = 0
    found_nbytes: int = 0
    """Of files that an earlier try had copied, and that are sound."""
    seconds: float = 0.0
    score: float | None = None


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What became of all that were to be copied."""

    source: str
    target: str
    """Both without credentials."""
    steps: tuple[CopiedStep, ...]

    @property
    def ok(self) -> bool:
        """Whether all of them are at the target now."""
        return all(step.outcome in ("copied", "already there") for step in self.steps)


def copy_steps(
    source: Where,
    target: Where,
    *,
    step: int | None = None,
    every: bool = False,
    told: Told = lambda step, nbytes, total: None,
    storage_options: Mapping[str, object] | None = None,
) -> CopyReport:
    """Copy the newest step of a run, or that one, or every one, to another run, which need not be there yet.

    What lies in the root of the run (`cc/`, the model card) is not copied; each step has its own copy of `cc/`. In any
    one thread of one process. Files that were copied before an error stay, for the next try.

    `CheckpointNotFoundError` if there is no such step; `CheckpointLoadError` where the source cannot be looked at;
    `CheckpointSaveError` if copying fails, or another process is copying the same step to the same place.

    Args:
        source: a run, or one step of it (`.../step_100`); a path, URL or `Storage`.
        target: the run that it goes to; likewise.
        told: hears of progress.
        storage_options: for fsspec, of both places that are no local paths; never logged.
    """
    if step is not None and every:
        raise InvalidOperationError("either one step or all of them can be copied", step=step)
    with opened(source, storage_options) as place:
        entries = _entries(place, step, every=every)
        run, own = _target(target, storage_options)
        try:
            done = [_copy_step(place.storage, run, entry, partial(told, entry.step)) for entry in entries]
            return CopyReport(place.storage.url, run.url, tuple(done))
        finally:
            if own:
                run.close()


def _target(where: Where, options: Mapping[str, object] | None) -> tuple[Storage, bool]:
    """The storage, and whether it is for us to close."""
    if not isinstance(where, (str, os.PathLike)):
        return where, False
    text = os.fspath(where)
    if parse_step(text.rstrip("/").rpartition("/")[2]) is not None:
        raise InvalidOperationError(f"{redact(text)} is called like a step: name the run that the steps are to be in")
    return open_storage(text, storage_options=options_for(text, options)), True


def _entries(place: Place, step: int | None, *, every: bool) -> list[Entry]:
    catalog = Catalog(place.storage)
    if place.file:
        raise CheckpointNotFoundError(f"{place.file} in {place.storage.url} is a file, and no run")
    if place.folder:
        wanted = parse_step(place.folder)
        if wanted is None or step not in (None, wanted):
            raise CheckpointNotFoundError(f"{place.folder} in {place.storage.url} is no such step", step=step)
        return [catalog.entry(wanted)]
    if step is not None:
        if step > LAST_STEP:
            raise CheckpointNotFoundError(f"there is no step {step}: numbers end at {LAST_STEP}", step=step)
        return [catalog.entry(step)]
    found = catalog.entries() if every else [entry for entry in (catalog.latest(),) if entry is not None]
    if not found:
        raise CheckpointNotFoundError(f"there is no committed step in {place.storage.url}")
    return found


def _copy_step(source: Storage, target: Storage, entry: Entry, told: Callable[[int, int], None]) -> CopiedStep:
    began = time.perf_counter()
    try:
        folder, record = Catalog(source).record(entry)
        plain = _plain(record)
        done = _already_there(target, plain)
        if done is None:
            done = _bring(source, folder, record, target, told)
        if done.outcome != "another is there":
            done = replace(done, score=_bring_score(source, target, entry))
    except CheckpointDamagedError as error:
        return CopiedStep(entry.step, "damaged", str(error), seconds=time.perf_counter() - began)
    except OSError as error:
        raise CheckpointSaveError(
            f"step {entry.step} was not copied from {source.url} to {target.url}: {error}; what was copied stays, and "
            "the same command goes on with it",
            step=entry.step,
        ) from error
    return replace(done, seconds=time.perf_counter() - began)


def _plain(record: Manifest) -> Manifest:
    """The record as it would be in any place: no attempt, the names of files as in a folder of their own, and of blobs
    only what is in them."""
    begin = f"{record.attempt}/"
    files = tuple(replace(file, name=file.name.removeprefix(begin), blob=_anywhere(file.blob)) for file in record.files)
    return replace(record, attempt="0" * 20, files=files)


def _anywhere(blob: str) -> str:
    if not blob:
        return ""
    _, digest, _, name = blob.split("/")
    return f"{blob_folder(digest, '0' * 20)}/{name}"


def _already_there(target: Storage, plain: Manifest) -> CopiedStep | None:
    outcome: Outcome = "another is there"
    try:
        found = _plain(Catalog(target).record(plain.step)[1])
    except CheckpointNotFoundError:
        return None
    except CheckpointDamagedError as error:
        what = f"its record is damaged, and was not touched: {error}"
    else:
        what = f"{target.url} has another checkpoint of this step, of {found.created}; it was not touched"
        if encode_manifest(found) == encode_manifest(plain):
            outcome, what = "already there", ""
    return CopiedStep(plain.step, outcome, what, len(plain.files), plain.nbytes)


def _bring(
    source: Storage, folder: str, record: Manifest, target: Storage, told: Callable[[int, int], None]
) -> CopiedStep:
    """Copy what is not there yet, and commit."""
    plain = _plain(record)
    attempt = hashlib.sha256(encode_manifest(plain)).hexdigest()[:20]
    prefix = attempt_prefix(target, plain.step, attempt)
    if isinstance(target, RenamingStorage):
        target.make_folder(prefix, exist_ok=True)
    with alone(target, prefix):
        committed = _already_there(target, plain)
        if committed is not None:  # by another copy, between the first look and the lock
            target.delete_tree(prefix)
            return committed
        sound = _sound_files(target, prefix, [file for file in plain.files if not file.blob])
        found_nbytes = sum(file.nbytes for file in sound)
        told(found_nbytes, plain.nbytes)
        missing = [pair for pair in zip(record.files, plain.files, strict=True) if pair[1] not in sound]
        way = Way(source, folder, target, prefix, lambda nbytes: told(nbytes, plain.nbytes))
        copy_files(way, [pair for pair in missing if not pair[0].blob])
        blobs = {pair[1].name: copy_blob(way, pair) for pair in missing if pair[0].blob}
        target.delete([f"{prefix}/{LOCK}"] if isinstance(target, RenamingStorage) else [])
        files = tuple(blobs.get(file.name, file) for file in plain.files)
        commit_attempt(target, prefix, replace(plain, attempt=attempt, files=files))
    _drop_uploads(target, prefix)
    facts = (len(plain.files), plain.nbytes, plain.nbytes - found_nbytes, found_nbytes)
    return CopiedStep(plain.step, "copied", "", *facts)


def _sound_files(target: Storage, prefix: str, files: Sequence[FileEntry]) -> set[FileEntry]:
    """Those that an earlier try has copied; whatever else lies in its folder is removed."""
    wanted = {file.name: file for file in files}
    names = [name for name in files_below(target, prefix) if name != LOCK]
    right = [
        wanted[name] for name in names if name in wanted and _size(target, f"{prefix}/{name}") == wanted[name].nbytes
    ]
    found = sums(target, [Stretch(f"{prefix}/{file.name}", 0, file.nbytes) for file in right])
    sound = {file for file, crc in zip(right, found, strict=True) if crc == file.crc}
    target.delete(f"{prefix}/{name}" for name in names if wanted.get(name) not in sound)
    return sound


def _size(storage: Storage, key: str) -> int | None:
    try:
        return storage.size(key)
    except FileNotFoundError:
        return None


def _drop_uploads(target: Storage, prefix: str) -> None:
    """What a try that was killed had begun to put; nobody can need it any more."""
    if isinstance(target, SharedPuts):
        with suppress(OSError):
            for _ in starmap(target.abort_upload, target.list_uploads(prefix)):
                pass


def _bring_score(source: Storage, target: Storage, entry: Entry) -> float | None:
    """The score that the copy has now. One that it has already stays."""
    copy = Catalog(target).entry(entry.step)
    there = read_scores(target, [copy]).by_step.get(entry.step)
    score = read_scores(source, [entry]).by_step.get(entry.step)
    if there is None and score is not None:
        write_score(target, copy, score=score)
        return score
    return there
