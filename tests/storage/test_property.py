"""Any storage behaves like a dict of bytes, whatever is put and however it is read."""

from __future__ import annotations

import mmap
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardckpt.storage import (
    Buffer,
    FsspecStorage,
    LocalStorage,
    MemoryObjects,
    MemoryStorage,
    Read,
    Storage,
    Transfers,
    WriteMethod,
    open_storage,
)
from shardckpt.testing.storage_suite import filled

PAGE = mmap.PAGESIZE


def _memory(nbytes: int, seed: int, kind: str) -> Buffer:
    content = filled(nbytes, seed)
    if kind == "bytes":
        return content
    if kind == "bytearray":
        return bytearray(content)
    pages = mmap.mmap(-1, nbytes + PAGE)
    shift = 0 if kind == "aligned" else 8
    pages[shift : shift + nbytes] = content
    return memoryview(pages)[shift : shift + nbytes]


SIZES = st.one_of(st.integers(0, 50), st.sampled_from([PAGE - 1, PAGE, PAGE + 1, 3 * PAGE]), st.integers(0, 6 * PAGE))
PARTS = st.lists(
    st.builds(_memory, SIZES, st.integers(0, 99), st.sampled_from(["bytes", "bytearray", "aligned", "shifted"])),
    max_size=6,
)
KEYS = st.sampled_from(["a", "b/c", "b/d", "e/f/g"])
RANGES = st.lists(st.tuples(KEYS, st.floats(0, 1), st.floats(0, 1)), max_size=12)


def _local(way) -> Callable[[Path], Storage]:
    return lambda root: LocalStorage(root, write=WriteMethod(way, threads=2, piece_nbytes=2 * PAGE))


def _in_place(root: Path) -> Storage:
    from fsspec.implementations.local import LocalFileSystem

    return FsspecStorage(LocalFileSystem(), str(root), transfers=Transfers(request_nbytes=PAGE, wave_nbytes=3 * PAGE))


MAKERS: dict[str, Callable[[Path], Storage]] = {
    "memory": lambda root: MemoryStorage(),
    "objects": lambda root: MemoryObjects(),
    "direct": _local("direct"),
    "buffered": _local("buffered"),
    "dontcache": _local("dontcache"),
    "fsspec-memory": lambda root: open_storage(f"memory://{root.name}"),
    "fsspec-local": _in_place,
}


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(puts=st.dictionaries(KEYS, PARTS, min_size=1), wanted=RANGES, as_iterator=st.booleans())
def test_like_a_dict(tmp_path: Path, name: str, puts: dict, wanted: list, as_iterator: bool) -> None:
    storage = MAKERS[name](tmp_path / uuid.uuid4().hex)
    model = {key: b"".join(map(bytes, parts)) for key, parts in puts.items()}
    for key, parts in puts.items():
        assert storage.put(key, iter(parts) if as_iterator else parts) == len(model[key])
    for key, content in model.items():
        assert (storage.size(key), storage.read(key)) == (len(content), content)
    reads = []
    for key, low, high in wanted:
        if key in model:
            start, end = sorted((round(low * len(model[key])), round(high * len(model[key]))))
            reads.append((Read(key, start, memoryview(bytearray(end - start))), model[key][start:end]))
    storage.read_into([read for read, _ in reads])
    for read, content in reads:
        assert bytes(read.into) == content
    storage.delete(model)
    assert all(not storage.list(folder) for folder in ("b", "e/f"))
