"""Commit: the seam between file systems that rename and object stores that do not. All of it runs on rank 0.

File system: an attempt is the folder `step_N.<attempt>.tmp`; its record is written and synced in it, and one
rename of the folder makes it the step. A step that is there already is exchanged with it in one operation, or,
where the system cannot do that, moved aside first: between the two renames the step is in force under its `.old`
name (`shardckpt.run.catalog` looks there), so a crash at any point leaves the old or the new one.

Object store: the attempt's files lie under `step_N/<attempt>/`; putting `step_N/manifest.json` makes it the step.

On both an attempt replaces only the record that was in force when it began: one that was given up, and comes to its
commit when the step has been saved again, must not take the place of the newer one. A file system cannot look and
exchange in one operation, and a process may be stopped between the two for as long as it takes to save the step again.
So it looks again at what it got in exchange, and gives that back if it is not what it was to replace. (2026-11-26: the
first look alone let one of some hundred such jobs through. What remains is to be stopped, or killed, a second time,
between the exchange and the giving back, by chance both.)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from dataclasses import replace

from shardckpt.errors import CheckpointSaveError, CommitUnknownError, RootNotSharedError
from shardckpt.format.layout import MANIFEST, step_folder
from shardckpt.format.manifest import FileEntry, Manifest, decode_manifest, encode_manifest
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.storage.transfer.exchange import exchange, saved_meanwhile

_log = logging.getLogger(__name__)


def attempt_prefix(storage: Storage, step: int, attempt: str, *, folder: str | None = None) -> str:
    """Where the files of an attempt go. Pure; every rank computes it. `folder`: if not that of the step."""
    if isinstance(storage, RenamingStorage):
        return _aside(folder or step_folder(step), attempt, "tmp")
    return f"{folder or step_folder(step)}/{attempt}"


def begin_attempt(storage: Storage, prefix: str) -> bytes | None:
    """Make room for an attempt. `FileExistsError` if there is one of this id: ids are never used twice.

    Gives the step's record that is in force now; None if there is none.
    """
    if isinstance(storage, RenamingStorage):
        storage.make_folder(prefix)
        return _record_in(storage, prefix.rsplit(".", 2)[0])
    return _record_in(storage, prefix.rpartition("/")[0])


def check_room(storage: Storage, prefix: str) -> None:
    """On a rank that has not begun the attempt itself, before it writes: that it sees the folder of the attempt.

    `RootNotSharedError` if not. A put would make the folder, on a disk of its own, and give a receipt for a file that
    nobody else ever finds. So the folder is asked for by making it, which must fail: that is decided by the file system
    itself, also where this machine's idea of what is there is old (NFS). Of several ranks on such a disk the first one
    finds out, which is enough for the save to fail; the next may take the folder that it has made for the real one.
    """
    if not isinstance(storage, RenamingStorage):
        return
    try:
        storage.make_folder(prefix)
    except FileExistsError:
        return
    with contextlib.suppress(OSError):
        storage.delete_tree(prefix)
    raise RootNotSharedError(
        f"what rank 0 has made in {storage.url} is not there for this rank: the root must be one place for all ranks, "
        "a file system that all nodes mount or an object store"
    )


def check_kept(storage: Storage, prefix: str, files: Iterable[FileEntry]) -> None:
    """That what this rank wrote earlier, while the checkpoint was open, is still there. `CheckpointSaveError` if not.

    A checkpoint may be open for as long as its user likes, and another job at this root takes an attempt on which
    nothing happens for a leftover. What is written from now on keeps it from that.
    """
    for file in files:
        try:
            there = storage.size(f"{prefix}/{file.name}") == file.nbytes
        except FileNotFoundError:
            there = False
        if not there:
            raise CheckpointSaveError(
                f"{prefix}/{file.name} in {storage.url}, which was written before, is no longer there: this checkpoint "
                "was open for so long that another job has removed it as left over; save it again"
            )


def commit_attempt(
    storage: Storage, prefix: str, manifest: Manifest, *, folder: str | None = None, known: bytes | None = None
) -> None:
    """Make the attempt the step. Returns only if it is; raises `CommitUnknownError` where that cannot be told.

    `known` is what `begin_attempt` gave: the one record that may be replaced; `FileExistsError` if it is another now.
    """
    target = folder or step_folder(manifest.step)
    if isinstance(storage, RenamingStorage):
        _commit_by_rename(storage, prefix, manifest, target, known)
    else:
        _commit_by_record(storage, manifest, target, known)


def abandon_attempt(storage: Storage, prefix: str) -> None:
    """Remove what an attempt left behind, as far as that is possible; a writer that comes late harms nobody."""
    try:
        storage.delete_tree(prefix)
    except OSError as error:
        _log.warning("could not remove the leftovers of a failed save, %s: %s", prefix, error)


def _record_in(storage: Storage, folder: str) -> bytes | None:
    try:
        return storage.read(f"{folder}/{MANIFEST}")
    except FileNotFoundError:
        return None


def _commit_by_rename(
    storage: RenamingStorage, prefix: str, manifest: Manifest, target: str, known: bytes | None
) -> None:
    content = encode_manifest(manifest)
    storage.put(f"{prefix}/{MANIFEST}", [content])
    for folder in sorted({file.name.rpartition("/")[0] for file in manifest.files} - {""}, reverse=True):
        storage.sync_folder(f"{prefix}/{folder}")
    storage.sync_folder(prefix)
    try:
        replaced = _rename_into_place(storage, prefix, target, manifest, known)
    except OSError as error:
        _settle(storage, f"{target}/{MANIFEST}", content, manifest.step, error, survives=False)
        return
    if replaced is not None:
        _remove_replaced(storage, replaced)


def _rename_into_place(
    storage: RenamingStorage, prefix: str, target: str, manifest: Manifest, known: bytes | None
) -> str | None:
    """Make the attempt's folder the step's; gives the folder of a step that it has replaced."""
    try:
        storage.rename_folder(prefix, target)
        return None
    except FileExistsError:
        if _record_in(storage, target) not in (None, known):
            raise saved_meanwhile(storage, target) from None
        if storage.exchange_folders(prefix, target):
            if _is_another(storage, prefix, known):
                _give_back(storage, prefix, target, manifest)
                raise saved_meanwhile(storage, target) from None
            return prefix
    aside = _aside(target, manifest.attempt, "old")
    storage.rename_folder(target, aside)
    if _is_another(storage, aside, known):
        storage.rename_folder(aside, target)
        raise saved_meanwhile(storage, target)
    storage.rename_folder(prefix, target)
    return aside


def _give_back(storage: RenamingStorage, prefix: str, target: str, own: Manifest) -> None:
    try:
        storage.exchange_folders(prefix, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            left = _record_in(storage, prefix)
            if left is not None and decode_manifest(left).attempt == own.attempt:
                return  # it was exchanged, and only not synced
        raise CommitUnknownError(
            f"{target} in {storage.url} was saved by somebody else in the meantime, and could not be given back "
            f"({error}): what they saved is in {prefix}; make it {target} before another job removes it",
            step=own.step,
        ) from error


def _is_another(storage: Storage, replaced: str, known: bytes | None) -> bool:
    """Whether the step that was just replaced is not the one that was to be. An error here undoes no commit."""
    try:
        return _record_in(storage, replaced) not in (None, known)
    except OSError as error:
        _log.warning("which step was replaced by a save could not be looked up in %s: %s", replaced, error)
        return False


def _aside(folder: str, attempt: str, kind: str) -> str:
    """The name beside a folder; for `step_N` that of `layout.aside_folder`."""
    return f"{folder}.{attempt}.{kind}"


def _remove_replaced(storage: RenamingStorage, folder: str) -> None:
    """Remove the step that has just been replaced, record first; a folder that was never a step is left alone."""
    try:
        if MANIFEST in storage.list(folder):
            storage.delete([f"{folder}/{MANIFEST}"])
            storage.sync_folder(folder)
            storage.delete_tree(folder)
        else:
            _log.warning("a folder that held no committed step was in the way; it was set aside as %s", folder)
    except OSError as error:
        _log.warning("the new step is in force, but the replaced one, %s, could not be removed: %s", folder, error)


def _commit_by_record(storage: Storage, manifest: Manifest, target: str, known: bytes | None) -> None:
    stored = replace(
        manifest,
        files=tuple(replace(file, name=f"{manifest.attempt}/{file.name}") for file in manifest.files),
    )
    key = f"{target}/{MANIFEST}"
    content = encode_manifest(stored)
    try:
        replaced = known is not None and _replace_record(storage, key, known, content)
        if not replaced:
            storage.put(key, [content])
    except OSError as error:
        _settle(storage, key, content, manifest.step, error)
        return
    if known is not None and replaced:
        with contextlib.suppress(OSError, ValueError):  # no longer named by any record: leftovers, not checkpoints
            storage.delete_tree(f"{target}/{decode_manifest(known).attempt}")


def _replace_record(storage: Storage, key: str, known: bytes, content: bytes) -> bool:
    """Put the record over the one that is known; False if that is gone, and `FileExistsError` if it is another now."""
    try:
        exchange(storage, key, known, content)
    except FileNotFoundError:
        return False
    return True


def _settle(storage: Storage, key: str, content: bytes, step: int, error: OSError, *, survives: bool = True) -> None:
    """After an error of the deciding operation: committed, not committed, or unknown.

    The attempt id in the record is the write id. `survives`: whether a record that can be read is a durable one; a
    rename that took place, but could not be synced, is in force now and may be gone after a power cut.
    """
    try:
        found = storage.read(key)
    except FileNotFoundError:
        raise error from None
    except OSError as second:
        raise CommitUnknownError(
            f"whether {key} is in force cannot be told ({error}; then {second}); nothing was deleted: look again",
            step=step,
        ) from error
    if found != content:
        raise error
    if not survives:
        raise CommitUnknownError(
            f"{key} is in force, but may not survive a power cut, since its folder could not be synced: {error}",
            step=step,
        ) from error
