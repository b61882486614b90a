"""Zip archives checked by what they say of themselves: the CRC of each record, which `torch.load` never looks at.

For files that no record of ours speaks of: attempts that did not commit, and checkpoints of others. Bytes between
the records (padding, local headers) have no CRC in a zip. Our own archives follow from their index and nesting, to the
last byte: of these a flip anywhere is found.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

from shardckpt.storage.base import Read, Storage
from shardckpt.tools.checking.own import Own, damaged_tensors, is_own, read_own
from shardckpt.tools.checking.summing import Stretch, sums
from shardckpt.tools.report import Problem

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_END = b"PK\x05\x06"
_LOOKS = 1 << 20
_MOST_HEADER = 100 << 20
"""Bytes of the header of a safetensors file; the format allows no more."""


@dataclass(frozen=True, slots=True)
class Archive:
    """What was found of one archive."""

    problems: tuple[Problem, ...]
    own: Own | None = None
    """What it says of itself, if it is one of ours and that is well-formed."""
    checked_nbytes: int = 0
    note: str = ""
    """Why it could not be checked, if it could not."""


class Window(io.RawIOBase):
    """An object of a storage as a file to be read."""

    def __init__(self, storage: Storage, key: str, nbytes: int) -> None:
        self._storage, self._key, self._nbytes, self._at = storage, key, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._nbytes)[whence]
        if self._at < 0:
            raise ValueError("an offset before the beginning of the file")
        return self._at

    def readinto(self, into: Any) -> int:
        with memoryview(into).cast("B") as view:
            size = max(0, min(len(view), self._nbytes - self._at))
            if size:
                self._storage.read_into([Read(self._key, self._at, view[:size])])
                self._at += size
        return size


def check_archive(storage: Storage, key: str, name: str, *, nbytes: int, quick: bool = False) -> Archive:
    """Check one file; `name` is what reports call it. `OSError` if the storage does not answer; no other error."""
    if name.endswith(".safetensors"):
        return _check_safetensors(storage, key, name, nbytes)
    if not _is_zip(storage, key, nbytes):
        return Archive((), note=f"{name} is no zip archive, and nothing in it tells whether it is whole")
    try:
        with zipfile.ZipFile(io.BufferedReader(Window(storage, key, nbytes), _LOOKS)) as archive:
            check_count(storage, key, nbytes, len(archive.infolist()))
            if is_own(archive):
                return _check_own(storage, key, name, read_own(archive, nbytes), quick=quick)
            return Archive(()) if quick else _check_members(storage, key, name, archive)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, zlib.error, KeyError) as error:
        return Archive((Problem(name, f"its zip directory is damaged, or its end is missing ({error})"),))


def _is_zip(storage: Storage, key: str, nbytes: int) -> bool:
    """By either end of it: one of them may be damaged."""
    if nbytes < 22:
        return nbytes > 0 and _bytes(storage, key, 0, min(4, nbytes)).startswith(b"PK")
    return _bytes(storage, key, 0, 2) == b"PK" or _bytes(storage, key, nbytes - 22, 22).startswith(_END)


def check_count(storage: Storage, key: str, nbytes: int, found: int) -> None:
    """`ValueError` if the directory has not as many entries as its end says: `zipfile` does not look at that."""
    end = _bytes(storage, key, nbytes - 22, 22)
    said = int.from_bytes(end[10:12], "little")
    if end.startswith(_END) and said not in (found, 0xFFFF):
        raise ValueError(f"{found} records where there should be {said}")


def _check_own(storage: Storage, key: str, name: str, own: Own, *, quick: bool) -> Archive:
    if quick:
        return Archive((), own)
    (crc,) = sums(storage, [Stretch(key, 0, own.nbytes)])
    if crc == own.crc:
        return Archive((), own, own.nbytes)
    tensors = damaged_tensors(storage, key, own.index)
    what = "bytes of tensors are not those of their CRC" if tensors else "its headers or its padding are damaged"
    return Archive((Problem(name, what, tensors),), own, own.nbytes)


def _check_members(storage: Storage, key: str, name: str, archive: zipfile.ZipFile) -> Archive:
    members = [member for member in archive.infolist() if not member.is_dir()]
    stored = [member for member in members if member.compress_type == zipfile.ZIP_STORED]
    starts = data_starts(storage, key, stored)
    placed = [(member, start) for member, start in zip(stored, starts, strict=True) if start is not None]
    found = sums(storage, [Stretch(key, start, member.file_size) for member, start in placed])
    wrong = [member for member, crc in zip((m for m, _ in placed), found, strict=True) if crc != member.CRC]
    wrong += [member for member, start in zip(stored, starts, strict=True) if start is None]
    pressed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
    wrong += [member for member in pressed if not _inflates(archive, member)]
    checked = sum(member.file_size for member in members)
    if not wrong:
        return Archive((), checked_nbytes=checked)
    names = ", ".join(member.filename.partition("/")[2] or member.filename for member in wrong[:5])
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    problem = Problem(name, f"records whose bytes are not those of their CRC ({names}{more})")
    return Archive((problem,), checked_nbytes=checked)


def data_starts(storage: Storage, key: str, members: list[zipfile.ZipInfo]) -> list[int | None]:
    """Where the bytes of each stored record begin, which only its local header tells; None if that is damaged.

    Names stand in both headers: one that was changed in either shows here.
    """
    nbytes = storage.size(key)
    names = {member: _name_bytes(member) for member in members}
    heads = {
        member: bytearray(_LOCAL.size + len(name))
        for member, name in names.items()
        if 0 <= member.header_offset <= nbytes - _LOCAL.size - len(name) - member.file_size
    }
    storage.read_into([Read(key, member.header_offset, memoryview(head)) for member, head in heads.items()])
    starts: list[int | None] = []
    for member, name in names.items():
        head = heads.get(member, bytearray(_LOCAL.size))
        magic, *_, named, extra = _LOCAL.unpack_from(head)
        sound = magic == b"PK\x03\x04" and named == len(name) and head[_LOCAL.size :] == name
        starts.append(member.header_offset + len(head) + extra if sound else None)
    return starts


def _name_bytes(member: zipfile.ZipInfo) -> bytes:
    return member.orig_filename.encode("utf-8" if member.flag_bits & 0x800 else "cp437", "surrogateescape")


def _inflates(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    """Whether a compressed record comes out as its CRC says; never holds more than a window of it."""
    try:
        with archive.open(member) as stream:
            while stream.read(_LOOKS):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        return False
    return True


def _check_safetensors(storage: Storage, key: str, name: str, nbytes: int) -> Archive:
    """Its header and its size: the format has no checksums."""
    try:
        length = int.from_bytes(_bytes(storage, key, 0, 8), "little")
        if not 2 <= length <= min(_MOST_HEADER, nbytes - 8):
            raise ValueError("the length of its header is not one")
        header = json.loads(_bytes(storage, key, 8, length))
        ends = [entry["data_offsets"][1] for tensor, entry in header.items() if tensor != "__metadata__"]
        if 8 + length + max(ends, default=0) != nbytes:
            raise ValueError(f"it should have {8 + length + max(ends, default=0)} bytes and has {nbytes}")
    except (ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        return Archive((Problem(name, f"it is damaged or truncated ({error})"),))
    return Archive((), note=f"{name}: only its header and its size could be checked, the format has no checksums")


def _bytes(storage: Storage, key: str, offset: int, nbytes: int) -> bytes:
    content = bytearray(nbytes)
    storage.read_into([Read(key, offset, memoryview(content))])
    return bytes(content)
