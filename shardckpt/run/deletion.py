"""Deletion of one step, and of what is left over when a process died on the way. Rank 0 only, in any one thread.

The record goes first, then the files: a crash at any point leaves a whole checkpoint or none. On a file system the
folder is first renamed to `step_N.deleted<id>.old`. Under that name it is still in force (`shardckpt.run.catalog`)
until its record is gone, and from then on its name says that it was a checkpoint of ours and is to go: `step_N` with
no record in it might as well be somebody else's work, and could never be swept.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress

from shardckpt.errors import CheckpointDeleteError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.layout import MANIFEST, Aside, aside_folder, new_attempt, parse_aside, step_folder
from shardckpt.format.manifest import Manifest
from shardckpt.run.catalog import Catalog, Entry, read_record
from shardckpt.run.scores import score_key
from shardckpt.storage.base import RenamingStorage, Storage

_log = logging.getLogger(__name__)

_DOOMED = "deleted"
"""How the id in the name of a folder begins that a deletion has set aside; the ids of attempts are hexadecimal."""


def delete_step(storage: Storage, entry: Entry, *, manifest: Manifest | None = None) -> None:
    """Delete a committed step; with its record, an object store need not be asked what belongs to it.

    `CheckpointDeleteError` if that failed, at any point. The step is then whole or no longer offered, and a second
    try, or for leftovers `sweep`, does the rest. On an object store other attempts of the same step are not touched.
    """
    try:
        if isinstance(storage, RenamingStorage):
            _remove_folder(storage, _set_aside(storage, entry.step, entry.folder))
        else:
            _remove_objects(storage, entry, manifest)
    except OSError as error:
        raise CheckpointDeleteError(
            f"step {entry.step} in {storage.url} was not deleted, or not wholly: {error}; "
            "if it is still listed it is still whole, and can be deleted again",
            step=entry.step,
        ) from error


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


def _set_aside(storage: RenamingStorage, step: int, folder: str) -> str:
    """Rename a folder to the name of one that is to go, unless it has such a name; give the name."""
    aside = parse_aside(folder)
    if aside is not None and _is_doomed(aside):
        return folder
    target = aside_folder(step, _DOOMED + new_attempt(), "old")
    storage.rename_folder(folder, target)
    return target


def _is_doomed(aside: Aside) -> bool:
    return aside.kind == "old" and aside.attempt.startswith(_DOOMED)


def _remove_folder(storage: RenamingStorage, folder: str) -> None:
    storage.delete([f"{folder}/{MANIFEST}"])
    with suppress(FileNotFoundError):  # somebody else has removed the whole folder meanwhile
        storage.sync_folder(folder)  # or a power cut could bring the record back, and not the files
    storage.delete_tree(folder)


def _remove_objects(storage: Storage, entry: Entry, manifest: Manifest | None) -> None:
    storage.delete([entry.record_key])
    attempt_folder = entry.attempt_folder
    if manifest is not None:
        attempt_folder = f"{entry.folder}/{manifest.attempt}"
        storage.delete([*(f"{entry.folder}/{file.name}" for file in manifest.files), score_key(entry)])
    if attempt_folder == entry.folder:
        _log.warning("step %d: which files in %s/%s were its own is not known", entry.step, storage.url, entry.folder)
    else:
        storage.delete_tree(attempt_folder)


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
        return _is_doomed(aside) or (aside.kind == "tmp" and aside.attempt in own_attempts)
    except CheckpointLoadError:
        return False  # unreadable now, damaged, or of another step: for a person to judge
    if aside.kind == "tmp" and manifest.attempt == aside.attempt:
        return aside.attempt in own_attempts  # it had written its record, and failed at the rename
    return _is_in_force(catalog, aside.step)


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
        _remove_folder(storage, folder)
    else:
        storage.delete_tree(folder)
