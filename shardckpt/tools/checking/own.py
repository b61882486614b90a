"""An archive of ours without any record: it follows, to the last byte, from its index and its nesting. No torch."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass

from shardckpt.format.archive import INDEX_NAME, PREFIX, front_of, header_of, lay_out, make_tail
from shardckpt.format.checksum import combine, crc32
from shardckpt.format.index import ArchiveIndex, decode_index
from shardckpt.format.manifest import Extent
from shardckpt.storage.base import Storage
from shardckpt.tools.checking.summing import Stretch, sums

_TREE = f"{PREFIX}/data.pkl"
_INDEX = f"{PREFIX}/{INDEX_NAME}"
_MOST = 1 << 30
"""Bytes of an index or a nesting: those of 20,000 tensors have a few million."""


@dataclass(frozen=True, slots=True)
class Own:
    """What an archive of ours says of itself, and what its bytes must therefore be."""

    index: ArchiveIndex
    tree: bytes
    """The pickle of its nesting; not to be unpickled but by `decode_tree`."""
    index_at: Extent
    tree_at: Extent
    nbytes: int
    crc: int
    """Of the whole file, as it follows from the rest."""


def is_own(archive: zipfile.ZipFile) -> bool:
    """Whether it has an index of ours, sound or not."""
    return _INDEX in archive.NameToInfo


def read_own(archive: zipfile.ZipFile, nbytes: int) -> Own:
    """What it says of itself. `ValueError`, `BadZipFile`, `KeyError` or `EOFError` for what is not well-formed."""
    content, tree = _small(archive, _INDEX), _small(archive, _TREE)
    index = decode_index(content, nbytes)
    layout = lay_out([record.nbytes for record in index.records])
    if [slot.data for slot in layout.slots] != [record.at for record in index.records]:
        raise ValueError("its tensors do not lie where such an archive has them")
    tail = make_tail(layout, [record.crc for record in index.records], content, tree)
    if layout.tail + len(tail.content) != nbytes:
        raise ValueError(f"it has {nbytes} bytes, and its index tells of {layout.tail + len(tail.content)}")
    pieces = [_sized(front_of(layout))]
    for slot, record in zip(layout.slots, index.records, strict=True):
        pieces += [_sized(header_of(slot, record.crc)), (record.crc, record.nbytes)]
    crc = combine([*pieces, _sized(tail.content)])[0]
    return Own(index, tree, tail.index, tail.tree, nbytes, crc)


def _small(archive: zipfile.ZipFile, name: str) -> bytes:
    """A record that is read whole: its size stands in a directory that may be damaged."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > _MOST:
        raise ValueError(f"{name} is compressed, or has {member.file_size} bytes")
    return archive.read(member)


def damaged_tensors(storage: Storage, key: str, index: ArchiveIndex) -> tuple[str, ...]:
    """The tensors whose bytes are not those of their CRC in the index."""
    found = sums(storage, [Stretch(key, record.at, record.nbytes) for record in index.records])
    wrong = {number for number, record in enumerate(index.records) if found[number] != record.crc}
    return tuple(dict.fromkeys(box.name for box in index.boxes if box.record in wrong))


def _sized(content: bytes) -> tuple[int, int]:
    return crc32(content), len(content)
