"""The `.pt` file: a zip archive whose layout is known before any byte of it.

The archive is what `torch.save` writes (stored records, `data.pkl`, `data/<n>`), with three differences that
torch and zip tools accept: large records begin on a page and small ones on 64 bytes; every CRC-32 stands in the
local header as well as in the directory; and a JSON record, `shardckpt.json`, says what each tensor is.

    version, byteorder | data/0 | data/1 | ...  | shardckpt.json | data.pkl | central directory
    '---------------- fixed by the record sizes ----------------' '--------- the tail ----------'

Since the tensors come first, their offsets depend only on their sizes: the image of the next save has the same
layout, whatever the Python values in `data.pkl` have become.

Source of the format: PKWARE APPNOTE 6.3.10, sections 4.3-4.5 (zip64), and caffe2/serialize/inline_container.cc
(padding by an extra field with the id "FB").
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from shardckpt.format.checksum import combine, crc32

PAGE = 4096
LINE = 64
LARGE = 1 << 16
"""From this size on a record begins on a page (direct I/O, mmap); below, on a cache line."""

PREFIX = "archive"
INDEX_NAME = "shardckpt.json"
_FRONT = (("version", b"3\n"), ("byteorder", b"little"))
"""The first records; torch asks for both."""
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_DOS_DATE = 0x21  # 1 January 1980: the same state gives the same bytes
_MAX32 = 0xFFFFFFFF
CRC_AT = 14
"""Where the CRC stands in a local header, in bytes from its beginning."""
_CENTRAL_CRC_AT = 16
"""The same in a central header."""
_PUT_CRC = struct.Struct("<I").pack_into


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one record lies: `header` and `data` are byte offsets in the file."""

    name: str
    header: int
    data: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.data + self.nbytes


@dataclass(frozen=True, slots=True)
class ArchiveLayout:
    """The fixed part of an archive: the front records, and one slot for each tensor record. Made by `lay_out`.

    `directory` holds the central headers of all of them, those of the slots with a CRC of zero, and `crcs_at` says
    at which of its bytes each slot's CRC belongs: with a layout that is kept, a tail costs next to nothing.
    """

    front: tuple[Slot, ...]
    slots: tuple[Slot, ...]
    directory: bytes = field(default=b"", repr=False)
    crcs_at: tuple[int, ...] = field(default=(), repr=False)

    @property
    def tail(self) -> int:
        """Byte offset at which the tail begins."""
        return (self.slots[-1] if self.slots else self.front[-1]).end


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of an archive: its bytes, and where in the file the index and the pickle lie (offset, nbytes, crc)."""

    content: bytes
    index: tuple[int, int, int]
    tree: tuple[int, int, int]


def lay_out(sizes: Sequence[int]) -> ArchiveLayout:
    """The layout for tensor records of these sizes in bytes, in this order."""
    position = 0
    front: list[Slot] = []
    for name, content in _FRONT:
        front.append(_place(name, position, len(content)))
        position = front[-1].end
    slots: list[Slot] = []
    for number, nbytes in enumerate(sizes):
        slots.append(_place(f"data/{number}", position, nbytes))
        position = slots[-1].end
    headers = [_central_header(slot, crc32(content)) for slot, (_, content) in zip(front, _FRONT, strict=True)]
    at = sum(map(len, headers)) + _CENTRAL_CRC_AT
    crcs_at: list[int] = []
    for slot in slots:
        headers.append(_central_header(slot, 0))
        crcs_at.append(at)
        at += len(headers[-1])
    return ArchiveLayout(tuple(front), tuple(slots), b"".join(headers), tuple(crcs_at))


def write_headers(layout: ArchiveLayout, image: memoryview, *, within: tuple[int, int] | None = None) -> None:
    """Put the front records and every local header (CRC still zero) into a fresh image.

    `within`: only those that touch these bytes, for an image of which only they are written.
    """
    start, end = within or (0, layout.tail)
    for slot, (_, content) in zip(layout.front, _FRONT, strict=True):
        image[slot.header : slot.data] = header_of(slot, crc32(content))
        image[slot.data : slot.end] = content
    for slot in layout.slots:
        if slot.header < end and slot.data > start:
            image[slot.header : slot.data] = header_of(slot, 0)


def front_of(layout: ArchiveLayout) -> bytes:
    """What comes before the first slot's header."""
    image = bytearray(layout.front[-1].end)
    write_headers(layout, memoryview(image), within=(0, 0))
    return bytes(image)


def write_crcs(
    layout: ArchiveLayout, image: memoryview, crcs: Sequence[int], *, within: tuple[int, int] | None = None
) -> None:
    """Put each record's CRC into its local header; `within` as for `write_headers`."""
    if within is None:  # the usual case, and there may be 20,000
        for slot, crc in zip(layout.slots, crcs, strict=True):
            _PUT_CRC(image, slot.header + CRC_AT, crc)
        return
    start, end = within
    for slot, crc in zip(layout.slots, crcs, strict=True):
        if slot.header < end and slot.data > start:
            _PUT_CRC(image, slot.header + CRC_AT, crc)


def make_tail(layout: ArchiveLayout, crcs: Sequence[int], index: bytes, tree: bytes) -> Tail:
    """Index, pickle and central directory. Its length does not depend on the values of the CRCs."""
    start = layout.tail
    index_slot = _place(INDEX_NAME, start, len(index))
    tree_slot = _place("data.pkl", index_slot.end, len(tree))
    index_crc, tree_crc = crc32(index), crc32(tree)
    pieces = [header_of(index_slot, index_crc), index, header_of(tree_slot, tree_crc), tree]
    directory = bytearray(layout.directory)
    for at, crc in zip(layout.crcs_at, crcs, strict=True):
        _PUT_CRC(directory, at, crc)
    directory += _central_header(index_slot, index_crc) + _central_header(tree_slot, tree_crc)
    count = len(layout.front) + len(layout.slots) + 2
    pieces += [bytes(directory), _end_of_directory(count, tree_slot.end, len(directory))]
    return Tail(
        b"".join(pieces),
        (index_slot.data, len(index), index_crc),
        (tree_slot.data, len(tree), tree_crc),
    )


def file_crc(layout: ArchiveLayout, image: memoryview, crcs: Sequence[int], tail: Tail) -> int:
    """The CRC of the whole file without reading the large records again."""
    pieces: list[tuple[int, int]] = []
    position = 0
    for slot, crc in zip(layout.slots, crcs, strict=True):
        if slot.nbytes >= LARGE:
            pieces += [(crc32(image[position : slot.data]), slot.data - position), (crc, slot.nbytes)]
            position = slot.end
    pieces.append((crc32(image[position : layout.tail]), layout.tail - position))
    pieces.append((crc32(tail.content), len(tail.content)))
    return combine(pieces)[0]


def _place(name: str, position: int, nbytes: int) -> Slot:
    header_nbytes = _LOCAL.size + len(PREFIX) + 1 + len(name) + _zip64_nbytes(nbytes) + 4
    align = PAGE if nbytes >= LARGE else LINE
    data = -(-(position + header_nbytes) // align) * align
    return Slot(name, position, data, nbytes)


def _zip64_nbytes(nbytes: int) -> int:
    return 20 if nbytes >= _MAX32 else 0


def header_of(slot: Slot, crc: int) -> bytes:
    """The local header of a record."""
    name = f"{PREFIX}/{slot.name}".encode()
    wide = slot.nbytes >= _MAX32
    size = _MAX32 if wide else slot.nbytes
    zip64 = struct.pack("<HHQQ", 1, 16, slot.nbytes, slot.nbytes) if wide else b""
    extra_nbytes = slot.data - slot.header - _LOCAL.size - len(name)
    padding = extra_nbytes - len(zip64) - 4
    fields = (b"PK\x03\x04", 45 if wide else 20, 0, 0, 0, _DOS_DATE, crc, size, size, len(name), extra_nbytes)
    return b"".join((_LOCAL.pack(*fields), name, zip64, struct.pack("<2sH", b"FB", padding), b"Z" * padding))


def _central_header(slot: Slot, crc: int) -> bytes:
    name = f"{PREFIX}/{slot.name}".encode()
    wide = [value for value in (slot.nbytes, slot.nbytes, slot.header) if value >= _MAX32]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, offset = min(slot.nbytes, _MAX32), min(slot.header, _MAX32)
    version = 45 if wide else 20
    numbers = (crc, size, size, len(name), len(extra), 0, 0, 0, 0, offset)
    return _CENTRAL.pack(b"PK\x01\x02", version, version, 0, 0, 0, _DOS_DATE, *numbers) + name + extra


def _end_of_directory(count: int, start: int, nbytes: int) -> bytes:
    wide = b""
    if count >= 0xFFFF or start >= _MAX32 or nbytes >= _MAX32:
        end64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, nbytes, start)
        wide = end64 + struct.pack("<4sIQI", b"PK\x06\x07", 0, start + nbytes, 1)
    short = min(count, 0xFFFF)
    fields = (b"PK\x05\x06", 0, 0, short, short, min(nbytes, _MAX32), min(start, _MAX32), 0)
    return wide + struct.pack("<4sHHHHIIH", *fields)
