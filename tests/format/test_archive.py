"""The archive against its readers: torch, Python's zipfile, and the system's unzip."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import zipfile
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.format.archive import (
    CRC_AT,
    INDEX_NAME,
    LARGE,
    LINE,
    PAGE,
    file_crc,
    lay_out,
    make_tail,
    write_headers,
)
from shardckpt.format.index import ITEMSIZE, decode_index, encode_index
from shardckpt.format.tree import decode_tree
from tests.format.images import DTYPES, Image, build_image, is_same, name_of, some_tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]

SIZES = st.lists(st.sampled_from([0, 1, 4, 63, 64, 65, 4096, LARGE - 1, LARGE, LARGE + 1]), max_size=12)


def every_kind_of_tensor() -> dict:
    """Each dtype as matrix, scalar, one element, empty, and large enough for a page of its own."""
    shapes = ((3, 5), (), (1,), (0, 4), (2, 0, 3), (1, 70_000))
    return {
        name: [some_tensor(dtype, shape, seed) for seed, shape in enumerate(shapes)] for name, dtype in DTYPES.items()
    }


@pytest.fixture(scope="module")
def state() -> dict:
    tied = torch.arange(20_000, dtype=torch.float32)
    return {
        "kinds": every_kind_of_tensor(),
        "model": {"embedding": tied, "head": tied, "layers": [{"w": torch.eye(3)}, {"w": torch.zeros(0)}]},
        "optimizer": {"param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": ["a", "b"]}], "state": {}},
        "values": [None, True, -(1 << 70), 2.5, float("nan"), "é", b"\xff", b"", (1, ("x",)), {1: {2: 3}}, {4, 5}],
        7: torch.ones(2),
    }


@pytest.fixture(scope="module")
def image(state: dict) -> Image:
    return build_image(state)


@pytest.fixture(scope="module")
def path(image: Image, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("archive") / "rank_0.pt"
    file.write_bytes(image.content)
    return str(file)


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_loads_every_dtype_and_shape(state: dict, path: str, mmap: bool) -> None:
    loaded = torch.load(path, mmap=mmap, weights_only=True)
    assert is_same(state, loaded)
    head, embedding = loaded["model"]["head"], loaded["model"]["embedding"]
    assert head.data_ptr() == embedding.data_ptr(), "tied tensors came back as two"
    assert state["model"]["layers"][0]["w"].data_ptr() != head.data_ptr()


def test_torch_loads_it_from_a_stream(state: dict, image: Image) -> None:
    assert is_same(state, torch.load(io.BytesIO(image.content), weights_only=True))


def test_every_storable_dtype_of_torch_has_its_size_and_no_other_is_listed() -> None:
    names = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    dtypes = {name_of(getattr(torch, name)): getattr(torch, name) for name in names}
    storable = {}
    for name, dtype in dtypes.items():
        tensor = torch.empty(0, dtype=dtype)
        buffer = io.BytesIO()
        try:
            torch.save(tensor, buffer)
            buffer.seek(0)
            assert torch.load(buffer, weights_only=True).dtype == dtype
            torch.zeros(2 * dtype.itemsize, dtype=torch.uint8).view(dtype)
        except (KeyError, RuntimeError):
            continue
        storable[name] = dtype.itemsize
    assert {name: size for name, size in ITEMSIZE.items() if name in dtypes} == storable
    assert {"qint8", "quint4x2", "int4", "uint3"}.isdisjoint(ITEMSIZE)


def test_zip_tools_accept_it(path: str) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    unzip = shutil.which("unzip")
    if unzip is not None:
        done = subprocess.run([unzip, "-t", path], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        assert "No errors detected" in done.stdout


def test_zip_tools_notice_a_flipped_byte_in_any_tensor(image: Image) -> None:
    for slot in image.layout.slots[:: max(1, len(image.layout.slots) // 12)]:
        if slot.nbytes:
            damaged = bytearray(image.content)
            damaged[slot.end - 1] ^= 1
            assert zipfile.ZipFile(io.BytesIO(damaged)).testzip() == f"archive/{slot.name}"


def test_local_headers_carry_the_crc_too(image: Image) -> None:
    for slot, crc in zip(image.layout.slots, image.crcs, strict=True):
        assert struct.unpack_from("<I", image.content, slot.header + CRC_AT) == (crc,)
        assert crc == zlib.crc32(image.content[slot.data : slot.end])


def test_the_tail_says_where_index_and_pickle_lie(image: Image) -> None:
    for name, (at, nbytes, crc) in ((INDEX_NAME, image.tail.index), ("data.pkl", image.tail.tree)):
        content = image.content[at : at + nbytes]
        assert zlib.crc32(content) == crc
        assert zipfile.ZipFile(io.BytesIO(image.content)).read(f"archive/{name}") == content
    at, nbytes, _ = image.tail.index
    index = decode_index(image.content[at : at + nbytes], len(image.content))
    assert index.records == tuple(image.records)
    assert index.boxes == tuple(image.boxes)
    at, nbytes, _ = image.tail.tree
    loaded = torch.load(io.BytesIO(image.content), weights_only=True)
    assert decode_tree(image.content[at : at + nbytes])["values"][:3] == loaded["values"][:3]


@given(SIZES)
@settings(max_examples=60, deadline=None)
def test_slots_are_aligned_in_order_and_leave_no_gap(sizes: list[int]) -> None:
    layout = lay_out(sizes)
    image = bytearray(layout.tail)
    write_headers(layout, memoryview(image))
    position = 0
    for slot in (*layout.front, *layout.slots):
        assert slot.header == position, "bytes between two records would be covered by no CRC"
        assert slot.data % (PAGE if slot.nbytes >= LARGE else LINE) == 0
        signature, name_nbytes, extra_nbytes = struct.unpack_from("<4s22xHH", image, slot.header)
        assert (signature, slot.header + 30 + name_nbytes + extra_nbytes) == (b"PK\x03\x04", slot.data)
        position = slot.end
    assert [slot.nbytes for slot in layout.slots] == sizes
    assert layout.tail == position


@given(SIZES)
@settings(max_examples=40, deadline=None)
def test_the_crc_of_the_file_follows_from_its_pieces(sizes: list[int]) -> None:
    image = build_image({"t": [some_tensor(torch.uint8, (size,), seed) for seed, size in enumerate(sizes)]})
    fixed = memoryview(image.content)[: image.layout.tail]
    assert file_crc(image.layout, fixed, image.crcs, image.tail) == zlib.crc32(image.content)


def test_lengths_do_not_depend_on_crcs(image: Image) -> None:
    for crcs in ([0] * len(image.crcs), [0xFFFFFFFF] * len(image.crcs)):
        records = [type(r)(r.dtype, r.shape, r.at, r.nbytes, crc) for r, crc in zip(image.records, crcs, strict=True)]
        index = encode_index(records, image.boxes)
        assert len(index) == image.tail.index[1]
        assert len(make_tail(image.layout, crcs, index, image.tree).content) == len(image.tail.content)


def test_the_same_state_gives_the_same_bytes(state: dict, image: Image) -> None:
    assert build_image(state).content == image.content


def test_other_python_values_do_not_move_the_tensors() -> None:
    tensors = {"a": torch.ones(5), "b": torch.ones(40_000)}
    first, second = build_image({"step": 1, **tensors}), build_image({"step": "one thousand", **tensors})
    assert first.layout == second.layout
    assert first.content[: first.layout.tail] == second.content[: second.layout.tail]
    assert first.content != second.content


def test_an_archive_without_tensors() -> None:
    image = build_image({"step": 3})
    assert torch.load(io.BytesIO(image.content), weights_only=True) == {"step": 3}
    assert zipfile.ZipFile(io.BytesIO(image.content)).testzip() is None
    assert file_crc(image.layout, memoryview(image.content), [], image.tail) == zlib.crc32(image.content)


def test_as_many_crcs_as_records_are_needed(image: Image) -> None:
    with pytest.raises(ValueError, match="zip"):
        make_tail(image.layout, image.crcs[1:], b"", b"")
