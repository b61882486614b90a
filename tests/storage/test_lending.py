"""A lent file is looked at where it lies, and what cannot be had is an error: no signal ends the process."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardckpt.storage import LocalStorage, MemoryStorage
from shardckpt.storage.posix import map as posix_map
from shardckpt.storage.posix.map import MappedFile
from shardckpt.storage.transfer.lending import LendingStorage
from shardckpt.storage.wrapping import StorageWrapper

CONTENT = random.Random(3).randbytes(100_000)


@pytest.fixture(params=["brought by the kernel", "brought by reading, as before Linux 5.14"])
def lent(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MappedFile]:
    if "reading" in request.param:
        monkeypatch.setattr(posix_map, "POPULATE_READ", 9999)
    (tmp_path / "file").write_bytes(CONTENT)
    found = LocalStorage(tmp_path).lend("file")
    yield found
    found.close()


def test_only_a_file_system_lends() -> None:
    assert isinstance(LocalStorage("/nowhere"), LendingStorage)
    assert not isinstance(MemoryStorage(), LendingStorage)
    assert not isinstance(StorageWrapper(LocalStorage("/nowhere")), LendingStorage), "a wrapper must see every read"


def test_all_bytes_are_there(lent: MappedFile) -> None:
    rng = random.Random(0)
    for _ in range(100):
        start = rng.randrange(len(CONTENT))
        nbytes = rng.randrange(len(CONTENT) - start + 1)
        lent.bring(start, nbytes)
        assert lent.view[start : start + nbytes] == CONTENT[start : start + nbytes]
        lent.forget(start, nbytes)
    assert lent.view == CONTENT


def test_it_tells_what_is_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    lent = LocalStorage(tmp_path).lend("file")
    assert lent.is_here(0, len(CONTENT))
    assert lent.is_here(5000, 10)
    assert not lent.is_here(0, 0)
    assert not lent.is_here(99_999, 2)  # behind the end
    lent.close()
    os.truncate(path, 0)
    os.truncate(path, 1 << 20)  # a hole, which nobody has read
    lent = LocalStorage(tmp_path).lend("file")
    assert not lent.is_here(0, 1 << 20)
    lent.bring(50_000, 10)
    assert lent.is_here(50_000, 10)
    lent.close()


def test_a_lent_file_cannot_be_written_to(lent: MappedFile) -> None:
    assert lent.view.readonly


def test_bytes_behind_the_end(lent: MappedFile) -> None:
    lent.bring(len(CONTENT), 0)
    with pytest.raises(EOFError, match=r"'file' .*bytes 99999 to 100001"):
        lent.bring(99_999, 2)


def test_a_file_that_has_become_shorter(lent: MappedFile, tmp_path: Path) -> None:
    lent.bring(0, len(CONTENT))
    before = lent.state()
    os.truncate(tmp_path / "file", 5000)
    with pytest.raises((EOFError, OSError), match="'file'"):
        lent.bring(0, len(CONTENT))
    lent.bring(0, 5000)
    assert lent.view[:5000] == CONTENT[:5000]
    assert lent.state() != before


def test_its_state_tells_of_a_write_and_not_of_a_link(lent: MappedFile, tmp_path: Path) -> None:
    before = lent.state()
    os.link(tmp_path / "file", tmp_path / "backup")
    (tmp_path / "file").rename(tmp_path / "moved")
    assert lent.state() == before
    with open(tmp_path / "moved", "r+b") as file:
        file.write(b"other")
    os.utime(tmp_path / "moved", ns=(1, 1))  # clocks of files are coarse; a test is quick
    assert lent.state() != before


def test_a_deleted_file_stays_to_be_looked_at(lent: MappedFile, tmp_path: Path) -> None:
    (tmp_path / "file").unlink()
    lent.bring(0, len(CONTENT))
    assert lent.view == CONTENT


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lent = LocalStorage(tmp_path).lend("file")
    lent.bring(0, 0)
    assert not lent.view.nbytes
    with pytest.raises(EOFError):
        lent.bring(0, 1)
    lent.close()


@pytest.mark.parametrize("kind", ["missing", "folder", "link", "pipe"])
def test_what_is_no_file_is_not_lent(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        (tmp_path / "it").mkdir()
    elif kind == "link":
        (tmp_path / "file").write_bytes(CONTENT)
        (tmp_path / "it").symlink_to("file")
    elif kind == "pipe":
        os.mkfifo(tmp_path / "it")
    with pytest.raises(OSError, match="'it'"):
        LocalStorage(tmp_path).lend("it")


def test_closed_twice(lent: MappedFile) -> None:
    lent.close()
    lent.close()


@pytest.mark.parametrize("ready", [True, False])
def test_bytes_are_taken_into_several_buffers(lent: MappedFile, ready: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting only where the system can tell what is there."""
    if not ready:
        monkeypatch.setattr(os, "RWF_NOWAIT", 0)
    buffers = [memoryview(bytearray(n)) for n in (1, 5000, 77)]
    assert lent.take(100, buffers, wait=False) == ready
    assert lent.take(100, buffers, wait=True)
    assert b"".join(buffers) == CONTENT[100 : 100 + 5078]


def test_a_file_system_without_reads_that_do_not_wait_is_asked_once(
    lent: MappedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(*args: object) -> int:
        asked.append(args)
        raise OSError(errno.EOPNOTSUPP, "not supported")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        for _ in range(3):
            assert not lent.take(0, [memoryview(bytearray(9))], wait=False)
    assert len(asked) == 1


def test_bytes_that_are_not_there_are_not_taken(lent: MappedFile) -> None:
    buffer = memoryview(bytearray(10))
    assert not lent.take(len(CONTENT) - 5, [buffer], wait=False)
    with pytest.raises(EOFError, match="'file'"):
        lent.take(len(CONTENT) - 5, [buffer], wait=True)
