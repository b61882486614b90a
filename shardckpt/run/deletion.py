"""Deletion of one step, or of all of it but its model. Rank 0 only, in any one thread.

The record goes first, then the files: a crash at any point leaves a whole checkpoint or none. On a file system the
folder is first renamed to `step_N.deleted<id>.old`. Under that name it is still in force (`shardckpt.run.catalog`)
until its record is gone, and from then on its name says that it was a checkpoint of ours and is to go: `step_N` with
no record in it might as well be somebody else's work, and could never be swept.

To keep only the model, the record is replaced, at its place and in one operation, by one that names only the files of
the model; then the others go. A crash at any point leaves the whole step or the whole model, and perhaps files that no
record names, which the next try removes. Nothing is renamed: who loads the model beside this finds it all the time.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from shardckpt.errors import (
    CheckpointDamagedError,
    CheckpointDeleteError,
    CheckpointLoadError,
)
from shardckpt.format.checksum import crc32
from shardckpt.format.index import ArchiveIndex, decode_index
from shardckpt.format.layout import (
    CONSOLIDATED,
    MANIFEST,
    Aside,
    aside_folder,
    new_attempt,
    parse_aside,
)
from shardckpt.format.manifest import FileEntry, Manifest, encode_manifest
from shardckpt.format.reduced import NoModelError, Reduced, may_be_doomed, reduce_to_model
from shardckpt.run.catalog import Entry, read_record, read_record_with_text
from shardckpt.run.scores import score_key
from shardckpt.storage.base import Read, RenamingStorage, Storage
from shardckpt.storage.transfer.exchange import exchange

_log = logging.getLogger(__name__)

_DOOMED = "deleted"
"""How the id in the name of a folder begins that a deletion has set aside; the ids of attempts are hexadecimal."""


def delete_step(storage: Storage, entry: Entry, *, manifest: Manifest | None = None) -> None:
    """Delete a committed step; with its record, an object store need not be asked what belongs to it.

    `CheckpointDeleteError` if that failed, at any point. The step is then whole or no longer offered, and a second
    try, or for leftovers `sweep`, does the rest. On an object store other attempts of the same step are not touched.
    A step that somebody else has deleted meanwhile is deleted: two jobs, one of which woke up late, may prune at once.
    """
    try:
        if isinstance(storage, RenamingStorage):
            for folder in (*_older_ones(storage, entry), entry.folder):
                _delete_folder(storage, entry.step, folder)
        else:
            _remove_objects(storage, entry, manifest)
    except OSError as error:
        raise CheckpointDeleteError(
            f"step {entry.step} in {storage.url} was not deleted, or not wholly: {error}; "
            "if it is still listed it is still whole, and can be deleted again",
            step=entry.step,
        ) from error


def preserve_model(storage: Storage, entry: Entry, *, model_key: str | None = None) -> Reduced | None:
    """Delete all of a committed step but its model, its score, and the files in it that are none of ours.

    Gives what became of it; None of a step that has only its model already, and of which only what a crash left over is
    deleted. Nobody may be saving or deleting this very step: on a file system its new files could lie where old ones
    are about to be removed.

    `CheckpointDeleteError` if the step has no model (caused by `NoModelError`), or if something failed at any point; it
    is then whole, or its model is, and a second try does the rest. Errors of `read_record` where that fails, and
    `CheckpointDamagedError` where the consolidated model is not what the record says; then nothing was changed.

    Args:
        model_key: the key of the model's state, if the record does not say the right one.
    """
    known, record = read_record_with_text(storage, entry)
    if record.model_only:
        _remove_unnamed(storage, entry, record)
        return None
    try:
        index = _consolidated_index(storage, entry, record)
        reduced = reduce_to_model(record, model_key=model_key, consolidated=index)
    except NoModelError as error:
        raise CheckpointDeleteError(
            f"step {entry.step} in {storage.url} was left as it is, for there is no model in it to be kept: {error}; "
            "delete the step, or keep it",
            step=entry.step,
        ) from error
    _replace_record(storage, entry, known, reduced)
    _log_preserved(storage, reduced)
    return reduced


def _delete_folder(storage: RenamingStorage, step: int, folder: str) -> None:
    try:
        aside = _set_aside(storage, step, folder)
    except FileNotFoundError:
        _log.info("%s in %s was deleted by somebody else meanwhile", folder, storage.url)
        return
    remove_folder(storage, aside)


def _older_ones(storage: RenamingStorage, entry: Entry) -> list[str]:
    """Versions of the step that a crash left beside it, in the middle of a commit or of a deletion after which it was
    saved again: else one would take its place."""
    folders = [name[:-1] for name in storage.list() if name.endswith("/") and name[:-1] != entry.folder]
    asides = [(folder, parse_aside(folder)) for folder in folders]
    return [folder for folder, aside in asides if aside and aside.kind == "old" and aside.step == entry.step]


def _set_aside(storage: RenamingStorage, step: int, folder: str) -> str:
    """Rename a folder to the name of one that is to go, unless it has such a name; give the name."""
    aside = parse_aside(folder)
    if aside is not None and is_doomed(aside):
        return folder
    target = aside_folder(step, _DOOMED + new_attempt(), "old")
    storage.rename_folder(folder, target)
    return target


def is_doomed(aside: Aside) -> bool:
    """Whether a deletion has given a folder its name."""
    return aside.kind == "old" and aside.attempt.startswith(_DOOMED)


def remove_folder(storage: RenamingStorage, folder: str) -> None:
    """Delete a folder and what is in it, the record, if it has one, first and for good."""
    storage.delete([f"{folder}/{MANIFEST}"])
    with suppress(FileNotFoundError):  # somebody else has removed the whole folder meanwhile
        storage.sync_folder(folder)  # or a power cut could bring the record back, and not the files
    storage.delete_tree(folder)


def _remove_objects(storage: Storage, entry: Entry, manifest: Manifest | None) -> None:
    storage.delete([entry.record_key])
    attempt_folder = entry.attempt_folder
    if manifest is not None:
        attempt_folder = f"{entry.folder}/{manifest.attempt}"
        own = (f"{entry.folder}/{file.name}" for file in manifest.files if not file.blob)
        storage.delete([*own, score_key(entry)])
    if attempt_folder == entry.folder:
        _log.warning("step %d: which files in %s/%s were its own is not known", entry.step, storage.url, entry.folder)
    else:
        storage.delete_tree(attempt_folder)


def _consolidated_index(storage: Storage, entry: Entry, record: Manifest) -> ArchiveIndex | None:
    """What the consolidated file says of itself, for it is to stand for what is deleted; None if there is none."""
    file = next((file for file in record.files if file.kind == CONSOLIDATED), None)
    if file is None or file.index is None:
        return None
    try:
        return _read_index(storage, f"{entry.folder}/{file.name}", file)
    except (FileNotFoundError, EOFError, ValueError) as error:
        raise CheckpointDamagedError(
            f"step {entry.step} in {storage.url} was left as it is, for its consolidated model is damaged: {error}",
            step=entry.step,
        ) from error
    except OSError as error:
        raise CheckpointLoadError(
            f"step {entry.step} was left as it is, for its model cannot be read now: {error}", step=entry.step
        ) from error


def _read_index(storage: Storage, key: str, file: FileEntry) -> ArchiveIndex:
    assert file.index is not None
    at, nbytes, crc = file.index
    if storage.size(key) != file.nbytes:
        raise ValueError(f"{key} is not of {file.nbytes} bytes")
    content = bytearray(nbytes)
    storage.read_into([Read(key, at, memoryview(content))])
    if crc32(content) != crc:
        raise ValueError(f"the index of {key} is not what was written")
    return decode_index(bytes(content), file.nbytes)


def _replace_record(storage: Storage, entry: Entry, known: bytes, reduced: Reduced) -> None:
    """Put the record of the model in force; then delete what it does not name."""
    try:
        exchange(storage, entry.record_key, known, encode_manifest(reduced.manifest))
        doomed = [f"{entry.folder}/{file.name}" for file in reduced.doomed if not file.blob]
        _delete_beside(storage, entry, reduced.manifest, doomed)
    except OSError as error:
        raise _not_preserved(storage, entry, str(error)) from error


def _remove_unnamed(storage: Storage, entry: Entry, record: Manifest) -> None:
    """What a crash left of the files that went with the rest of a step: by name, and only ours."""
    folder = entry.folder if isinstance(storage, RenamingStorage) else f"{entry.folder}/{record.attempt}"
    named = {f"{entry.folder}/{file.name}" for file in record.files}
    try:
        there = [f"{folder}/{name}" for name in storage.list(folder) if may_be_doomed(name)]
        left = [key for key in there if key not in named]
        _delete_beside(storage, entry, record, left)
    except OSError as error:
        raise _not_preserved(storage, entry, str(error)) from error
    if left:
        _log.info("step %d in %s: removed %d files that a crash had left", entry.step, storage.url, len(left))


def _delete_beside(storage: Storage, entry: Entry, record: Manifest, keys: list[str]) -> None:
    """Delete files of a step with this record; nothing if it has another one by now."""
    if not keys:
        return
    if read_record(storage, entry) != record:
        raise _not_preserved(storage, entry, "it was saved again meanwhile")
    storage.delete(keys)


def _not_preserved(storage: Storage, entry: Entry, reason: str) -> CheckpointDeleteError:
    return CheckpointDeleteError(
        f"step {entry.step} in {storage.url} was not reduced to its model, or not wholly: {reason}; "
        "it is whole, or its model is, and a second try does the rest",
        step=entry.step,
    )


def _log_preserved(storage: Storage, reduced: Reduced) -> None:
    step, kept = reduced.manifest.step, reduced.manifest.nbytes
    freed = sum(file.nbytes for file in reduced.doomed if not file.blob)
    _log.info("step %d in %s: kept the model, %d bytes, and deleted %d bytes", step, storage.url, kept, freed)
    if reduced.mixed:
        _log.warning(
            "step %d in %s: only %d of %d bytes were freed, because %s. save_consolidated_fsdp_model before the commit "
            "puts the model into a file of its own, which then is all that stays",
            step, storage.url, freed, freed + kept, reduced.mixed,
        )  # fmt: skip
