"""The zip archives of `torch.save`: which storage lies where, the tree that says what it is, and the storages' sums.

Source of the format: `torch.serialization._save` and `_load`, caffe2/serialize/inline_container.cc. Everything in the
file is untrusted; records are never unpacked, for torch only ever stores them.
"""

from __future__ import annotations

import io
import struct
import threading
import zipfile
import zlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from shardckpt.format.archive import INDEX_NAME
from shardckpt.format.checksum import crc32
from shardckpt.format.restricted.foreign import read_foreign
from shardckpt.storage.base import Storage
from shardckpt.tools.checking.archives import Window, check_count, data_starts
from shardckpt.tools.moving.foreign.reading import explained, named, read_bytes

_LOOKS = 1 << 20
_MOST_TREE = 1 << 30
"""Bytes of a pickle without its tensors: far more than any state has."""
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files begin that torch wrote before 1.6, or with `_use_new_zipfile_serialization=False`."""

_REFUSALS = (
    *(zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, zlib.error, KeyError),
    *(struct.error, OverflowError, IndexError, TypeError, AttributeError),
)
"""What `zipfile` raises for archives that are damaged, or were made to do harm."""


@dataclass(frozen=True, slots=True)
class Record:
    """A storage's bytes in the file, and their CRC-32 as the directory has it."""

    at: int
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class TorchZip:
    """What one archive says of itself; `tree` has a `StoredView` for each tensor."""

    key: str
    nbytes: int
    tree: Any
    tree_nbytes: int
    """Of its pickle."""
    records: Mapping[str, Record]
    """By the key of the storage."""
    is_own: bool
    """Whether it is a file of a step of ours."""


def open_zip(storage: Storage, key: str) -> TorchZip:
    """Look into an archive: its directory and its tree are read, no tensor.

    `CheckpointNotFoundError` if it is not there, `CheckpointDamagedError` if it is not what `torch.save` writes.
    """
    with explained(named(storage, key)):
        nbytes = storage.size(key)
        _check_kind(read_bytes(storage, key, 0, min(nbytes, len(_LEGACY))))
        try:
            with zipfile.ZipFile(io.BufferedReader(Window(storage, key, nbytes), _LOOKS)) as archive:
                members = archive.infolist()
                check_count(storage, key, nbytes, len(members))
                records = _records(storage, key, members)
        except OSError:
            raise
        except _REFUSALS as error:
            raise ValueError(f"its zip directory is damaged, or its end is missing ({error})") from error
        tree = _tree(storage, key, records)
    storages = {name[5:]: record for name, record in records.items() if name.startswith("data/")}
    return TorchZip(key, nbytes, tree, records["data.pkl"].nbytes, storages, INDEX_NAME in records)


def _check_kind(begin: bytes) -> None:
    if begin.startswith(_LEGACY):
        raise ValueError(
            "it is in the format that torch wrote before 1.6, which cannot be read without unpickling it: load it with "
            "torch.load(path, weights_only=True) and save it again with torch.save"
        )
    if not begin.startswith(b"PK"):
        raise ValueError("it is no zip archive of torch.save")


def _records(storage: Storage, key: str, members: list[zipfile.ZipInfo]) -> dict[str, Record]:
    """By name without the archive's own. `ValueError` for archives that torch would not write."""
    trees = [member.filename for member in members if member.filename.endswith("/data.pkl")]
    if len(trees) != 1 or trees[0].count("/") != 1:
        raise ValueError("it has no data.pkl, or several, as no file of torch.save has")
    prefix = trees[0].removesuffix("data.pkl")
    own = [member for member in members if member.filename.startswith(prefix) and not member.is_dir()]
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in own):
        raise ValueError("it has compressed records, which torch.save does not write")
    nbytes = storage.size(key)
    starts = data_starts(storage, key, own)
    records: dict[str, Record] = {}
    for member, start in zip(own, starts, strict=True):
        name = member.filename.removeprefix(prefix)
        if name in records or start is None or start + member.file_size > nbytes:
            raise ValueError(f"its record {name[:200]!r} is there twice, or is not where the directory says")
        records[name] = Record(start, member.file_size, member.CRC)
    _check_apart(records)
    if "constants.pkl" in records:
        raise ValueError("it is a program of TorchScript: save its state_dict()")
    return records


def _check_apart(records: Mapping[str, Record]) -> None:
    position = 0
    for record in sorted(records.values(), key=lambda record: (record.at, record.nbytes)):
        if record.at < position:
            raise ValueError("its records overlap")
        position = record.at + record.nbytes


def _tree(storage: Storage, key: str, records: Mapping[str, Record]) -> Any:
    order = records.get("byteorder")
    if order is not None and _content(storage, key, order) != b"little":
        raise ValueError("it was written on a machine of another byte order: load and save it again there")
    return read_foreign(_content(storage, key, records["data.pkl"]))


def _content(storage: Storage, key: str, record: Record) -> bytes:
    if record.nbytes > _MOST_TREE:
        raise ValueError(f"a pickle of {record.nbytes} bytes, besides its tensors")
    content = read_bytes(storage, key, record.at, record.nbytes)
    if crc32(content) != record.crc:
        raise ValueError("its data.pkl or byteorder is not what its CRC says")
    return content


@dataclass(slots=True)
class _Run:
    position: int = 0
    crc: int = 0


class RunningSums:
    """CRCs of records that are read bit by bit, known as soon as one has been read from its first byte to its last.

    Of any number of files. Any thread may call; pieces that come in no order are not summed up.
    """

    def __init__(self) -> None:
        self._runs: dict[Hashable, _Run] = {}
        self._lock = threading.Lock()

    def add(self, record: Hashable, at: int, content: memoryview, *, nbytes: int, crc: int) -> bool:
        """Some bytes of a record of so many bytes have been read; False if they were the last and this is not its CRC.

        A record is begun anew by its first byte.
        """
        with self._lock:
            run = self._runs.setdefault(record, _Run())
            if at == 0:
                run.position, run.crc = 0, 0
            if at != run.position:
                return True
            run.crc = crc32(content, run.crc)
            run.position += len(content)
            return run.position < nbytes or run.crc == crc
