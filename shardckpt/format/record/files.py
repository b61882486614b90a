"""A file as the commit record names it: how large, with which digest, and where it lies. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shardckpt.format.checksum import from_hex, to_hex
from shardckpt.format.index import as_size, as_text
from shardckpt.format.layout import check_blob_key, check_file_name

Extent = tuple[int, int, int]
"""A checked range of a file: byte offset, bytes, CRC-32."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the checkpoint; `name` is relative to the step's folder."""

    name: str
    nbytes: int
    crc: int
    kind: str
    """A `Home`, or a kind of which no table speaks: `CONSOLIDATED`, `METADATA`, `CARBON_COPY` (see `layout`)."""
    writer: int
    index: Extent | None = None
    tree: Extent | None = None
    blob: str = ""
    """The key, below the root, of a file that other steps may refer to as well; then nothing of this name lies in the
    step's folder."""

    def key_in(self, folder: str) -> str:
        """Its key in the storage, for a record that lies in this folder."""
        return self.blob or f"{folder}/{self.name}"


def keys_in(folder: str, files: Iterable[FileEntry]) -> Callable[[str], str]:
    """From the name of a file in a record to its key in the storage."""
    shared = {file.name: file.blob for file in files if file.blob}
    return lambda name: shared.get(name) or f"{folder}/{name}"


def encode_file(file: FileEntry) -> dict[str, Any]:
    """A file entry as JSON, as it stands in the record and travels in a receipt."""
    entry: dict[str, Any] = {"name": file.name, "nbytes": file.nbytes, "crc32": to_hex(file.crc)}
    entry |= {"kind": file.kind, "writer": file.writer}
    for part, extent in (("index", file.index), ("tree", file.tree)):
        if extent is not None:
            entry[part] = [extent[0], extent[1], to_hex(extent[2])]
    if file.blob:
        entry["blob"] = file.blob
    return entry


def decode_file(entry: Mapping[str, Any]) -> FileEntry:
    """A file entry from JSON; `ValueError` for names that leave the checkpoint and ranges that leave the file."""
    nbytes = as_size(entry["nbytes"])
    index, tree = _extent(entry.get("index"), nbytes), _extent(entry.get("tree"), nbytes)
    name, kind = check_file_name(entry["name"]), as_text(entry["kind"])
    blob = check_blob_key(entry["blob"]) if "blob" in entry else ""
    return FileEntry(name, nbytes, from_hex(entry["crc32"]), kind, as_size(entry["writer"]), index, tree, blob)


def _extent(value: Any, file_nbytes: int) -> Extent | None:
    if value is None:
        return None
    at, nbytes, crc = value
    if as_size(at) + as_size(nbytes) > file_nbytes:
        raise ValueError(f"bytes {at} to {at + nbytes} of a file of {file_nbytes}")
    return at, nbytes, from_hex(crc)
