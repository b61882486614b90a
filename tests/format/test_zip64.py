"""Archives beyond the limits of plain zip: 65,535 records, 4 GiB. On sparse files, so that nothing large is written."""

from __future__ import annotations

import functools
import mmap
import os
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shardckpt.format.archive import ArchiveLayout, file_crc, lay_out, make_tail, write_crcs, write_headers
from shardckpt.format.checksum import combine, crc32
from shardckpt.format.index import StoredRecord, encode_index
from shardckpt.format.tree import TensorRef, encode_tree

GIB4 = 1 << 32


@functools.cache
def crc_of_zeros(nbytes: int) -> int:
    """By doubling: the CRC of 4 GiB of zeros in 32 steps."""
    if nbytes < 2:
        return crc32(bytes(nbytes))
    half = (crc_of_zeros(nbytes // 2), nbytes // 2)
    return combine([half, half, (crc_of_zeros(nbytes % 2), nbytes % 2)])[0]


def write_sparse(path: Path, sizes: list[int], data: dict[int, bytes], tree: object) -> tuple[ArchiveLayout, list[int]]:
    """An archive of zeros; `data` are the last bytes of some records. Only pages that hold something are written."""
    layout = lay_out(sizes)
    ends = {number: data.get(number, b"") for number in range(len(sizes))}
    crcs = [
        combine([(crc_of_zeros(size - len(ends[i])), size - len(ends[i])), (crc32(ends[i]), len(ends[i]))])[0]
        for i, size in enumerate(sizes)
    ]
    records = [
        StoredRecord("uint8", (slot.nbytes,), slot.data, slot.nbytes, crc)
        for slot, crc in zip(layout.slots, crcs, strict=True)
    ]
    tail = make_tail(layout, crcs, encode_index(records, []), encode_tree(tree))
    with path.open("w+b") as file:
        file.truncate(layout.tail + len(tail.content))
        with mmap.mmap(file.fileno(), 0) as mapped, memoryview(mapped) as image:
            write_headers(layout, image)
            write_crcs(layout, image, crcs)
            for slot in layout.slots:
                end = ends[int(slot.name.removeprefix("data/"))]
                image[slot.end - len(end) : slot.end] = end
            image[layout.tail :] = tail.content
            assert file_crc(layout, image, crcs, tail) >= 0
    return layout, crcs


def local_sizes(path: Path, header: int) -> tuple[int, ...]:
    """The sizes in a local header; unpackers of streams read them. 0xFFFFFFFF: see the extra field."""
    with path.open("rb") as file:
        file.seek(header)
        *_, packed, plain, name_nbytes, extra_nbytes = struct.unpack("<4sHHHHHIIIHH", file.read(30))
        extra = file.read(name_nbytes + extra_nbytes)[name_nbytes:]
    if 0xFFFFFFFF not in (packed, plain):
        return packed, plain
    kind, nbytes, *sizes = struct.unpack_from("<HHQQ", extra)
    assert (packed, plain, kind, nbytes) == (0xFFFFFFFF, 0xFFFFFFFF, 1, 16)
    return tuple(sizes)


@pytest.fixture
def sparse(tmp_path: Path) -> Callable[..., tuple[Path, ArchiveLayout, list[int]]]:
    def make(sizes: list[int], data: dict[int, bytes], tree: object) -> tuple[Path, ArchiveLayout, list[int]]:
        path = tmp_path / "large.pt"
        layout, crcs = write_sparse(path, sizes, data, tree)
        if os.stat(path).st_blocks * 512 > 64 << 20:
            pytest.skip("this file system has no sparse files")
        return path, layout, crcs

    return make


@pytest.mark.parametrize("nbytes", [GIB4 - 2, GIB4 - 1, GIB4, GIB4 + 4097])
def test_a_record_around_4_gib(sparse: Callable, nbytes: int) -> None:
    last = bytes(range(1, 201)) * 500
    tree = {
        "large": TensorRef(0, torch.uint8, (nbytes,)),
        "small": TensorRef(1, torch.uint8, (10,)),
        "last": TensorRef(2, torch.uint8, (len(last),)),
    }
    path, layout, crcs = sparse([nbytes, 10, len(last)], {0: b"end", 1: b"0123456789", 2: last}, tree)
    with zipfile.ZipFile(path) as archive:
        for slot, crc in zip(layout.slots, crcs, strict=True):
            info = archive.getinfo(f"archive/{slot.name}")
            assert (info.header_offset, info.file_size, info.compress_size) == (slot.header, slot.nbytes, slot.nbytes)
            assert crc == info.CRC
        assert archive.read("archive/data/1") == b"0123456789"
        assert archive.read("archive/data/2") == last
        with archive.open("archive/data/0") as record:
            assert record.read(3) == bytes(3)
    assert local_sizes(path, layout.slots[0].header) == (nbytes, nbytes)
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded["large"].shape == (nbytes,)
    assert bytes(loaded["large"][-4:].tolist()) == b"\0end"
    assert bytes(loaded["small"].tolist()) == b"0123456789"
    assert bytes(loaded["last"].tolist()) == last
    assert layout.slots[-1].header > GIB4 - 2


def test_crcs_of_many_gib_follow_from_pieces() -> None:
    assert crc_of_zeros(100_000) == crc32(bytes(100_000))
    thirds = [(crc_of_zeros(GIB4 // 4), GIB4 // 4)] * 4
    assert combine(thirds) == (crc_of_zeros(GIB4), GIB4)


@pytest.mark.parametrize("count", [0xFFFF - 5, 0xFFFF - 4, 70_000])
def test_more_records_than_a_plain_directory_counts(tmp_path: Path, count: int) -> None:
    """Four further records make up the archive: the counts around 65,535 are those of all."""
    path = tmp_path / "many.pt"
    wanted = sorted({0, 1, 65_530, 65_534, 65_535, count - 1} & set(range(count)))
    tree = [TensorRef(number, torch.uint8, (1,)) for number in wanted]
    layout, _ = write_sparse(path, [1] * count, {number: bytes([number % 251]) for number in range(count)}, tree)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert len(names) == count + 4
        assert names[2:-2] == [f"archive/{slot.name}" for slot in layout.slots]
        assert archive.read(f"archive/data/{count - 1}") == bytes([(count - 1) % 251])
    end = path.read_bytes()[-98:]
    assert end.startswith(b"PK\x06\x06") == (count + 4 >= 0xFFFF), "65,535 in the short form means: see the long one"
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert [tensor.item() for tensor in loaded] == [number % 251 for number in wanted]
    unzip = shutil.which("unzip")
    if unzip is not None and count == 70_000:
        done = subprocess.run([unzip, "-tqq", str(path)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
