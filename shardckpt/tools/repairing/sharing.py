"""Which of the files that steps share belongs to a step whose record is lost.

On an object store the attempt itself says which content it wanted (`<file>.wanted`). On a file system nothing does;
but no blob is deleted while any step has lost its record (see `shardckpt/engine/writing/BLOBS.md`), so that the one
that is sought is among those that are there. If these have but one content of that name, with the tensors that another
step of the run has in its own, that is the one. If there are several, it cannot be told, and nothing is made up.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.layout import BLOBS, doomed_blobs, is_attempt
from shardckpt.format.manifest import FileEntry
from shardckpt.storage.base import Storage
from shardckpt.tools.checking.archives import Window, check_archive
from shardckpt.tools.checking.own import read_own
from shardckpt.tools.repairing.content import Content, content_of


@dataclass(frozen=True, slots=True)
class Shared:
    """A blob of a step: as a record names it, and what is in it."""

    entry: FileEntry
    content: Content


def find_shared(
    storage: Storage, like: FileEntry, content: Content, *, name: str, wanted: Mapping[str, str], step: int
) -> Shared | None:
    """The blob of this step for a file that another has; None if there is none with such tensors.

    `like`, `content`: that of the other step. `name`: of the file, without an attempt in front of it. `wanted`: name
    to digest, as far as the step itself says so. `CheckpointDamagedError` if several may be meant.
    """
    found: dict[str, Shared] = {}
    for digest in [wanted[name]] if name in wanted else _digests(storage):
        own = _sound(storage, digest, like, name)
        if own is not None and content.is_like(own.content):
            found[digest] = own
    if len(found) > 1:
        raise CheckpointDamagedError(
            f"{len(found)} versions of {name} lie in {BLOBS}/ ({', '.join(sorted(found))}), and nothing says which of "
            f"them step {step} had: its record cannot be made anew; go on from another step",
            step=step,
        )
    return next(iter(found.values()), None)


def _digests(storage: Storage) -> list[str]:
    return [name[:-1] for name in storage.list(BLOBS) if name.endswith("/")]


def _sound(storage: Storage, digest: str, like: FileEntry, name: str) -> Shared | None:
    """The first sound one of this content that nobody is about to delete."""
    names = storage.list(f"{BLOBS}/{digest}")
    doomed = doomed_blobs(names)
    for number in (each[:-1] for each in names if each.endswith("/")):
        key = f"{BLOBS}/{digest}/{number}/{name}"
        if is_attempt(number) and number not in doomed:
            try:
                nbytes = storage.size(key)
            except FileNotFoundError:
                continue
            if (shared := _read(storage, key, name, nbytes, like)) is not None:
                return shared
    return None


def _read(storage: Storage, key: str, name: str, nbytes: int, like: FileEntry) -> Shared | None:
    if check_archive(storage, key, name, nbytes=nbytes).problems:
        return None
    with zipfile.ZipFile(io.BufferedReader(Window(storage, key, nbytes))) as archive:
        own = read_own(archive, nbytes)
    entry = replace(like, name=name, nbytes=nbytes, crc=own.crc, index=own.index_at, tree=own.tree_at, blob=key)
    return Shared(entry, content_of(own.index, own.tree))
