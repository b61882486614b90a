"""The faults that other tests rely on happen as they are told to."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest

from shardckpt.storage import LocalStorage, MemoryObjects, MemoryStorage, Operation, Read, RenamingStorage
from shardckpt.testing.faults import (
    CountingStorage,
    FailingStorage,
    GatedStorage,
    RecordingStorage,
    TornStorage,
    flip_byte,
    on,
    truncate,
)
from shardckpt.testing.storage_suite import ranges


def test_failing_at_the_nth_matching_operation() -> None:
    storage = FailingStorage(MemoryStorage(), on("put", key="rank_1"), nth=2, times=2, error=lambda: OSError("boom"))
    storage.put("a/rank_1.pt", [b"1"])
    storage.put("a/rank_2.pt", [b"1"])
    for key in ("b/rank_1.pt", "c/rank_1.pt"):
        with pytest.raises(OSError, match="boom"):
            storage.put(key, [b"1"])
    storage.put("d/rank_1.pt", [b"1"])
    assert storage.list() == ["a/", "d/"]
    assert storage.failed == 2


def test_failing_after_the_deed() -> None:
    inner = MemoryStorage()
    storage = FailingStorage(inner, on("put"), after=True)
    with pytest.raises(ConnectionResetError):
        storage.put("a", [b"1"])
    assert inner.read("a") == b"1"


def test_a_gate_holds_back_what_matches() -> None:
    storage = GatedStorage(MemoryObjects(), on("put", key="slow"))
    thread = threading.Thread(target=lambda: storage.put("slow", [b"1"]))
    thread.start()
    assert storage.reached.wait(20)
    storage.put("quick", [b"1"])
    assert storage.list() == ["quick"]
    storage.open_gate()
    thread.join(20)
    assert storage.list() == ["quick", "slow"]


def test_a_forgotten_gate_gives_up() -> None:
    storage = GatedStorage(MemoryObjects(), limit=timedelta(0))
    with pytest.raises(TimeoutError, match="nobody opened"):
        storage.list()


def test_torn_reads() -> None:
    inner = MemoryObjects()
    inner.put("a", [b"0123456789"])
    storage = TornStorage(inner)
    storage.tear("a", flip=3)
    assert storage.read("a") == b"012\xcc456789"
    assert ranges(storage, "a", (0, 3), (2, 3), (4, 6)) == [b"012", b"2\xcc4", b"456789"]
    storage.tear("a", keep=5)
    assert (storage.read("a"), storage.size("a")) == (b"01234", 5)
    assert ranges(storage, "a", (0, 5)) == [b"01234"]
    with pytest.raises(EOFError, match="'a'"):
        ranges(storage, "a", (4, 2))
    storage.mend()
    assert (storage.read("a"), inner.read("a")) == (b"0123456789", b"0123456789")


def test_recording() -> None:
    storage = RecordingStorage(MemoryStorage())
    storage.put("a/b", [b"1"])
    storage.read_into([Read(key, 0, memoryview(bytearray(1))) for key in ("a/b", "a/b")])
    assert isinstance(storage, RenamingStorage)
    storage.rename_folder("a", "c")
    storage.delete(iter(["x", "y"]))
    assert [(operation.name, operation.keys) for operation in storage.operations] == [
        ("put", ("a/b",)),
        ("read_into", ("a/b",)),
        ("rename_folder", ("a", "c")),
        ("delete", ("x", "y")),
    ]
    assert Operation("close").key == ""


def test_counting() -> None:
    inner = MemoryObjects()
    storage = CountingStorage(inner)
    storage.put("a", [b"0123456789"])
    storage.read("a")
    ranges(storage, "a", (0, 3), (5, 2))
    with pytest.raises(EOFError):
        ranges(storage, "a", (9, 2))
    assert (storage.nbytes["a"], storage.requests["a"], storage.total_nbytes) == (15, 3, 15)
    assert (inner.reads.nbytes, inner.reads.requests) == (15, 3)


def test_damage_at_rest(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("a", [b"0123456789"])
    flip_byte(storage.path_of("a"), 0)
    flip_byte(storage.path_of("a"), -1)
    assert storage.read("a") == b"\xcf12345678\xc6"
    truncate(storage.path_of("a"), 4)
    assert storage.read("a") == b"\xcf123"
    with pytest.raises(ValueError, match="nothing would be cut"):
        truncate(storage.path_of("a"), 4)
    with pytest.raises(ValueError, match="no byte"):
        flip_byte(storage.path_of("a"), 4)
