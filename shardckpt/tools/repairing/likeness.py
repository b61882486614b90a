"""A record made anew by the likeness of another step of the run: a witness of which files, ranks and meshes there were.

If every file of the step holds the same tensors in the same places as the file of that name in a committed step, and
values of the same names, and no file is too many or missing, then both were saved by the same job in the same way. All
that its record says of ranks, meshes and placements then holds here, and nothing needs to be accepted unseen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from shardckpt.errors import CheckpointError
from shardckpt.format.checksum import crc32
from shardckpt.format.index import decode_index
from shardckpt.format.layout import CARBON_COPY, CONSOLIDATED, METADATA
from shardckpt.format.manifest import HOMES, FileEntry, Manifest
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import Read, Storage
from shardckpt.tools.repairing.content import Content, content_of
from shardckpt.tools.repairing.evidence import Evidence, entries_of
from shardckpt.tools.repairing.sharing import Shared, find_shared
from shardckpt.tools.report import REBUILT

LOST_TO_LIKENESS = ("metadata of the user", "time of the save")
_WITNESSES = 3
"""Steps that are looked at; neighbours of a job are alike, or none is."""


def rebuild_like_another(storage: Storage, evidence: Evidence, *, step: int, attempt: str) -> Manifest | None:
    """The record of these files if another step is a witness for it, else None."""
    for folder, witness in _witnesses(storage, step):
        if not _is_alike(storage, folder, witness, evidence):
            continue
        shared = _shared(storage, folder, witness, evidence, step=step)
        if shared is not None:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            kinds = {_name(witness, file): file.kind for file in witness.files if file.kind == CONSOLIDATED}
            story = {"from": "the files of the step", "like": witness.step, "at": now, "lost": list(LOST_TO_LIKENESS)}
            return replace(
                witness,
                step=step,
                attempt=attempt,
                created=now,
                files=tuple(sorted((*entries_of(evidence, kinds), *_entries(shared)), key=lambda file: file.name)),
                differ=_differing(witness, evidence, shared),
                metadata={REBUILT: story},
            )
    return None


def missing_beside_others(storage: Storage, evidence: Evidence, *, step: int, ranks: int) -> list[str]:
    """The files that a step of as many ranks has and this one has not; nothing if there is no other step."""
    for _, witness in _witnesses(storage, step):
        if witness.world_size == ranks:
            names = {_name(witness, file) for file in witness.files if file.kind in HOMES}
            return sorted(names - evidence.owns.keys())
    return []


def _witnesses(storage: Storage, step: int) -> Iterator[tuple[str, Manifest]]:
    """The nearest committed steps, by number."""
    catalog = Catalog(storage)
    near = sorted((entry for entry in catalog.entries() if entry.step != step), key=lambda e: abs(e.step - step))
    for entry in near[:_WITNESSES]:
        try:
            folder, witness = catalog.record(entry)
        except CheckpointError:
            continue
        if not witness.model_only and not any(layout.pieces for layout in witness.layouts):
            yield folder, witness


def _shared(
    storage: Storage, folder: str, witness: Manifest, evidence: Evidence, *, step: int
) -> dict[str, Shared] | None:
    """By name, what the step has of the files that steps share; None if it has not what the witness has."""
    found = {}
    for file in (file for file in witness.files if file.blob):
        name, content = _name(witness, file), _content(storage, folder, file)
        terms: dict[str, Any] = {"name": name, "wanted": evidence.wanted, "step": step}
        shared = None if content is None else find_shared(storage, file, content, **terms)
        if shared is None:
            return None
        found[name] = shared
    return found if found.keys() >= evidence.wanted.keys() else None


def _entries(shared: Mapping[str, Shared]) -> Iterator[FileEntry]:
    return (found.entry for found in shared.values())


def _is_alike(storage: Storage, folder: str, witness: Manifest, evidence: Evidence) -> bool:
    own = (file for file in witness.files if file.kind != CARBON_COPY and not file.blob)
    files = {_name(witness, file): file for file in own}
    if files.keys() != evidence.owns.keys():
        return False
    for name, file in files.items():
        if file.kind != METADATA:
            content = _content(storage, folder, file)
            if content is None or not evidence.contents[name].is_like(content):
                return False
    return True


def _content(storage: Storage, folder: str, file: FileEntry) -> Content | None:
    """What a file of the witness says of itself; None if that is damaged."""
    if file.index is None or file.tree is None:
        return None
    index, tree = (bytearray(extent[1]) for extent in (file.index, file.tree))
    key = file.key_in(folder)
    try:
        storage.read_into([Read(key, file.index[0], memoryview(index)), Read(key, file.tree[0], memoryview(tree))])
        if (crc32(index), crc32(tree)) != (file.index[2], file.tree[2]):
            return None
        return content_of(decode_index(bytes(index), file.nbytes), bytes(tree))
    except (OSError, EOFError, ValueError):
        return None


def _differing(witness: Manifest, evidence: Evidence, shared: Mapping[str, Shared]) -> tuple[str, ...]:
    """The keys that several files of a kind hold with different content, as a commit finds them."""
    layouts = witness.layouts
    plain = {n for t in witness.tables for n, entry in t.tensors.items() if layouts[entry.layout].mesh is None}
    seen: dict[tuple[str, str], set[str]] = {}
    kinds = {_name(witness, file): file.kind for file in witness.files}
    for name, content in (*evidence.contents.items(), *((name, found.content) for name, found in shared.items())):
        digests = content.values | {tensor: content.digest(tensor) for tensor in content.tensors if tensor in plain}
        for key, digest in digests.items():
            seen.setdefault((kinds[name], key), set()).add(digest)
    return tuple(sorted({key for (_, key), digests in seen.items() if len(digests) > 1}))


def _name(witness: Manifest, file: FileEntry) -> str:
    """Without the folder of the attempt, which it has on an object store."""
    return file.name.removeprefix(f"{witness.attempt}/")
