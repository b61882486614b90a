"""Faults that are put into the engine, one at a time: each must be noticed, or there is a proof that nothing can be.

A fault is either a sync that is claimed and not done (`syncs`), or a function of the engine that does something else
(`context`). It is looked for among the states of one act, under one model.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from shardckpt.engine.committing import commit, committer
from shardckpt.engine.loading.fetching import fetch
from shardckpt.engine.saving import write
from shardckpt.format import manifest
from shardckpt.format.layout import MANIFEST
from shardckpt.run import catalog, deletion
from shardckpt.run.shared import sweeping
from shardckpt.storage import local
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.storage.posix import folders
from shardckpt.testing.crash.recorder import Call, LeaveOut
from shardckpt.testing.crash.states import LYING, MINIMAL, ORDERED, Model


def _nothing(call: Call) -> bool:
    return False


@contextmanager
def _sound() -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Mutation:
    """One fault."""

    act: str
    """Where it shows."""
    model: Model = MINIMAL
    syncs: LeaveOut = _nothing
    context: Callable[[], AbstractContextManager[Any]] = _sound
    ranks: int = 2
    equivalent: str = ""
    """Why nothing can be noticed, where that is so."""
    looking: bool = False
    """Whether the fault is one of reading, so that it must be there while the states are judged."""


def _file(*names: str) -> LeaveOut:
    return lambda call: not call.is_folder and call.path.endswith(names)


def _folder(matches: Callable[[str], bool]) -> LeaveOut:
    return lambda call: call.is_folder and matches(call.path)


@contextmanager
def in_place() -> Iterator[None]:
    """The attempt is the step's own folder: nothing is renamed."""

    def prefix(storage: Storage, step: int, attempt: str, *, folder: str | None = None) -> str:
        return folder or f"step_{step}"

    def put(storage: RenamingStorage, at: str, record: Any, target: str, known: bytes | None) -> None:
        storage.put(f"{at}/{MANIFEST}", [commit.encode_manifest(record)])
        storage.sync_folder(at)

    from shardckpt.engine.committing import transaction

    with mock.patch.object(transaction, "attempt_prefix", prefix), mock.patch.object(commit, "_commit_by_rename", put):
        yield


@contextmanager
def record_first() -> Iterator[None]:
    """Every rank says that it has written before it has; the bytes come after the commit."""
    late: list[Callable[[], None]] = []
    real_write, real_put = write.write_files, commit._commit_by_rename

    def claim(storage: Storage, prefix: str, sealed: Sequence[Any], *args: Any, **kwargs: Any) -> write.OwnFiles:
        entries = tuple(file.entry for file in sealed if isinstance(file, write.SealedFile))
        kept = [replace(file, parts=[memoryview(bytes(part)) for part in file.parts]) for file in sealed]
        step = prefix.partition(".")[0]
        late.append(lambda: real_write(storage, step, kept, *args, **kwargs) and None)
        return write.OwnFiles(entries)

    def put(*args: Any) -> None:
        real_put(*args)
        while late:
            late.pop()()

    with mock.patch.object(committer, "write_files", claim), mock.patch.object(commit, "_commit_by_rename", put):
        yield


@contextmanager
def remove_and_rename() -> Iterator[None]:
    """The old step is removed to make way for the new one."""

    def into_place(storage: RenamingStorage, prefix: str, target: str, *_: object) -> None:
        storage.delete_tree(target)
        storage.rename_folder(prefix, target)

    with mock.patch.object(commit, "_rename_into_place", into_place):
        yield


@contextmanager
def replaced_in_place() -> Iterator[None]:
    """`replace` writes over the old content."""

    def replace_it(self: Any, key: str, content: bytes) -> None:
        with self._parent(key, "replace", create=True) as (folder, name):
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=folder)
            os.pwritev(file, [content], 0)
            os.fsync(file)
            os.close(file)
            folders.sync_descriptor(folder)

    with mock.patch.object(local.LocalStorage, "replace", replace_it):
        yield


@contextmanager
def files_before_record() -> Iterator[None]:
    """A deletion takes the tree as it comes, the record somewhere among it."""

    def remove(storage: RenamingStorage, folder: str) -> None:
        names = [name for name in storage.list(folder) if name != MANIFEST]
        storage.delete([f"{folder}/{name}" for name in names])
        storage.delete_tree(folder)

    with mock.patch.object(deletion, "remove_folder", remove):
        yield


@contextmanager
def record_not_synced_away() -> Iterator[None]:
    """A deletion does not wait until the record is gone for good."""

    def remove(storage: RenamingStorage, folder: str) -> None:
        with mock.patch.object(local, "sync_descriptor"):
            storage.delete([f"{folder}/{MANIFEST}"])
        storage.delete_tree(folder)

    with mock.patch.object(deletion, "remove_folder", remove):
        yield


@contextmanager
def replaced_not_synced_away() -> Iterator[None]:
    """The same of a step that was replaced."""

    def remove(storage: RenamingStorage, folder: str) -> None:
        with mock.patch.object(local, "sync_descriptor"):
            storage.delete([f"{folder}/{MANIFEST}"])
        storage.delete_tree(folder)

    with mock.patch.object(commit, "_remove_replaced", remove):
        yield


@contextmanager
def nothing_referred_to() -> Iterator[None]:
    """Blobs are deleted without a look at the records."""
    with mock.patch.object(sweeping, "references", return_value=frozenset()):
        yield


@contextmanager
def blind_to_asides() -> Iterator[None]:
    """The catalog does not look for a step that was set aside."""
    with mock.patch.object(catalog, "_replaced", return_value=None):
        yield


@contextmanager
def overwriting() -> Iterator[None]:
    """Files are opened without O_EXCL."""
    with mock.patch.object(local, "_CREATE", local._CREATE & ~os.O_EXCL):
        yield


@contextmanager
def without_noreplace() -> Iterator[None]:
    """Folders are renamed without RENAME_NOREPLACE."""

    def rename(old: tuple[int, str], new: tuple[int, str]) -> None:
        try:
            os.rename(old[1], new[1], src_dir_fd=old[0], dst_dir_fd=new[0])
        except OSError as error:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error

    with mock.patch.object(local, "rename_new", rename):
        yield


@contextmanager
def without_exchange() -> Iterator[None]:
    with mock.patch.object(local.LocalStorage, "exchange_folders", return_value=False):
        yield


class _Agreeing(int):
    """A sum that is equal to any."""

    def __ne__(self, other: object) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


@contextmanager
def tensors_not_summed() -> Iterator[None]:
    with mock.patch.object(fetch, "combine", return_value=(_Agreeing(0), 0)):
        yield


@contextmanager
def records_not_summed() -> Iterator[None]:
    """The digest in a record is not looked at."""

    class Any64(bytes):
        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = bytes.__hash__

    class Digest:
        def __init__(self, body: bytes) -> None:
            pass

        def hexdigest(self) -> Any:
            return mock.Mock(encode=lambda: Any64())

    with mock.patch.object(manifest, "hashlib", mock.Mock(sha256=Digest)):
        yield


def _is_attempt(path: str) -> bool:
    return path.endswith(".tmp")


def _is_step(path: str) -> bool:
    return path.startswith("run/step_") and not _is_attempt(path)


def _is_root(path: str) -> bool:
    return path == "run"


MUTATIONS: dict[str, Mutation] = {
    "no fsync of the files of ranks": Mutation("save", ORDERED, syncs=_file("_0.pt", "_1.pt")),
    "no fsync of one rank's file": Mutation("save", ORDERED, syncs=_file("rank_1.pt")),
    "no fsync of the model": Mutation("save", ORDERED, syncs=_file("model.pt")),
    "no fsync of a range that ranks share": Mutation("save, files shared by ranks", ORDERED, syncs=_file("model.pt")),
    "no fsync of the record": Mutation("save", ORDERED, syncs=_file(MANIFEST)),
    "no fsync of the consolidated model": Mutation("export", ORDERED, syncs=_file("/model.pt")),
    "no fsync of the metadata": Mutation("transaction", ORDERED, syncs=_file("metadata.pt")),
    "no fsync of what `replace` writes": Mutation(
        "delete, keep model", ORDERED, syncs=lambda c: MANIFEST + "." in c.path
    ),
    "no fsync of a record that a repair writes": Mutation("repair", ORDERED, syncs=lambda c: MANIFEST + "." in c.path),
    "no rename of a record that a repair writes": Mutation("repair", ORDERED, context=replaced_in_place),
    "no fsync of the folder of a step that is repaired": Mutation("repair", syncs=_folder(_is_step)),
    "no fsync of the record of an attempt that is repaired": Mutation(
        "repair, an attempt", ORDERED, syncs=_file(MANIFEST)
    ),
    "no fsync of any folder": Mutation("save", ORDERED, syncs=_folder(lambda path: True)),
    "no fsync of the attempt's folder": Mutation("save", syncs=_folder(_is_attempt)),
    "no fsync of the root": Mutation("save", syncs=_folder(_is_root)),
    "no fsync of the folder above the root": Mutation("save", syncs=_folder(lambda path: path == "")),
    "no fsync of a step's folder at a deletion": Mutation("prune", context=record_not_synced_away),
    "no fsync of the folder of a replaced step": Mutation(
        "same step again, no exchange",
        context=replaced_not_synced_away,
        equivalent="what comes back of a replaced step lies beside the newer one, is passed over for it, and goes "
        "before it when the step is deleted (until 2026-11-26 it did not, and was then offered, torn)",
    ),
    "no fsync of the folders of blobs": Mutation("blobs", syncs=_folder(lambda path: "/blobs" in path)),
    "blobs go although steps refer to them": Mutation("blobs", context=nothing_referred_to),
    "no rename of the attempt": Mutation("save", ORDERED, context=in_place),
    "no rename in `replace`": Mutation("delete, keep model", ORDERED, context=replaced_in_place),
    "the old step is removed before the new one is renamed": Mutation(
        "same step again", ORDERED, context=remove_and_rename
    ),
    "no barrier: receipts before bytes": Mutation("save", ORDERED, context=record_first),
    "a deletion that takes files before the record": Mutation("prune", ORDERED, context=files_before_record),
    "a catalog that does not look aside": Mutation(
        "same step again, no exchange", ORDERED, context=blind_to_asides, looking=True
    ),
    "no digest of tensors": Mutation("save", LYING, context=tensors_not_summed, looking=True),
    "no digest of the record": Mutation(
        "save",
        LYING,
        context=records_not_summed,
        looking=True,
        equivalent="a record is one file, written once: what a power cut takes of it is cut off or is zeros, and JSON "
        "ends with its brace and has no NUL; damage of other kinds is looked for by tests/format/record",
    ),
    "no exchange of folders": Mutation(
        "same step again",
        context=without_exchange,
        equivalent="two renames do the same, since the catalog looks for a step that was set aside (the fault above)",
    ),
    "no O_EXCL": Mutation(
        "same step again",
        context=overwriting,
        equivalent="every file lies in the folder of an attempt, which is made by one mkdir under 80 random bits, so "
        "no two writers ever open the same name; two that do are told by the contract "
        "(tests/storage/test_contract.py), which fails without the flag",
    ),
    "no RENAME_NOREPLACE": Mutation(
        "same step again",
        context=without_noreplace,
        equivalent="rename(2) of a folder replaces an empty folder only, never a step; that an empty one is refused as "
        "well is in the contract (shardckpt.testing.renaming_suite), which fails without the flag",
    ),
}


@contextmanager
def never_refusing() -> Iterator[None]:
    """On an object store: a record is put without the condition that there is none."""

    def commit_it(storage: Storage, record: Any, target: str, known: bytes | None) -> None:
        files = tuple(replace(file, name=f"{record.attempt}/{file.name}") for file in record.files)
        storage.replace(f"{target}/{MANIFEST}", commit.encode_manifest(replace(record, files=files)))

    with mock.patch.object(commit, "_commit_by_record", commit_it):
        yield


@contextmanager
def claimed_puts() -> Iterator[None]:
    """On an object store: every rank says that it has put its files before it has; they come after the commit."""
    late: list[Callable[[], None]] = []
    real_write, real_put = write.write_files, commit._commit_by_record

    def claim(storage: Storage, prefix: str, sealed: Sequence[Any], *args: Any, **kwargs: Any) -> write.OwnFiles:
        entries = tuple(file.entry for file in sealed if isinstance(file, write.SealedFile))
        kept = [replace(file, parts=[memoryview(bytes(part)) for part in file.parts]) for file in sealed]
        late.append(lambda: real_write(storage, prefix, kept, *args, **kwargs) and None)
        return write.OwnFiles(entries)

    def put(*args: Any) -> None:
        real_put(*args)
        while late:
            late.pop()()

    with mock.patch.object(committer, "write_files", claim), mock.patch.object(commit, "_commit_by_record", put):
        yield


@contextmanager
def objects_before_record() -> Iterator[None]:
    """On an object store: a deletion takes the files first."""

    def remove(storage: Storage, entry: Any, record: Any) -> None:
        storage.delete_tree(entry.attempt_folder)
        storage.delete([entry.record_key])

    with mock.patch.object(deletion, "_remove_objects", remove):
        yield


OBJECT_MUTATIONS: dict[str, Mutation] = {
    "no barrier: receipts before bytes": Mutation("save", context=claimed_puts),
    "a deletion that takes files before the record": Mutation("prune", context=objects_before_record),
    "blobs go although steps refer to them": Mutation("blobs", context=nothing_referred_to),
    "no write-once: the record is put over what is there": Mutation("save", context=never_refusing),
}
