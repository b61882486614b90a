"""Which part of a file is damaged, once its digest has said that it is: by the CRCs that stand inside it. No torch."""

from __future__ import annotations

from shardckpt.format.checksum import crc32
from shardckpt.format.index import ArchiveIndex, decode_index
from shardckpt.format.manifest import FileEntry
from shardckpt.storage.base import Read, Storage
from shardckpt.tools.checking.own import damaged_tensors
from shardckpt.tools.checking.summing import Stretch, sums
from shardckpt.tools.report import Problem


def locate(storage: Storage, folder: str, file: FileEntry) -> Problem:
    """What is to be said of a file of the right size whose bytes are not those that its record has the digest of."""
    key = file.key_in(folder)
    if file.index is None:
        return Problem(file.name, "its bytes are not those that were written")
    try:
        index = _read_index(storage, key, file)
    except (OSError, EOFError, ValueError):
        return Problem(
            file.name, "its bytes are not those that were written: its index is damaged, or it is the file of another"
        )
    tensors = damaged_tensors(storage, key, index)
    if tensors:
        return Problem(file.name, "bytes of tensors are not those that were written", tensors)
    where = "the nesting and the Python values" if _tree_is_damaged(storage, key, file) else "headers or padding"
    return Problem(file.name, f"its bytes are not those that were written, outside of all tensors: {where}")


def _read_index(storage: Storage, key: str, file: FileEntry) -> ArchiveIndex:
    assert file.index is not None
    at, nbytes, crc = file.index
    content = bytearray(nbytes)
    storage.read_into([Read(key, at, memoryview(content))])
    if crc32(content) != crc:
        raise ValueError(f"the index of {key} is not what was written")
    return decode_index(bytes(content), file.nbytes)


def _tree_is_damaged(storage: Storage, key: str, file: FileEntry) -> bool:
    if file.tree is None:
        return False
    at, nbytes, crc = file.tree
    return sums(storage, [Stretch(key, at, nbytes)]) != [crc]
