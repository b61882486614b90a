"""Every storage passes the suite of the seam."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from shardckpt.storage import (
    FsspecStorage,
    LocalStorage,
    MemoryObjects,
    MemoryStorage,
    RenamingStorage,
    RetryingStorage,
    RetryPolicy,
    SharedPuts,
    Storage,
    StorageWrapper,
    Transfers,
    open_storage,
)
from shardckpt.testing.faults import CountingStorage, FailingStorage, GatedStorage, RecordingStorage, TornStorage, on
from shardckpt.testing.renaming_suite import RenamingContract
from shardckpt.testing.storage_suite import StorageContract
from tests.storage.s3server import S3Server

SMALL = Transfers(whole_nbytes=12 << 20, part_nbytes=5 << 20, request_nbytes=1 << 20, wave_nbytes=4 << 20)


class TestMemoryStorage(RenamingContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return MemoryStorage("contract")


class TestMemoryObjects(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return MemoryObjects("contract")

    def test_it_is_no_file_system(self, storage: Storage) -> None:
        assert not isinstance(storage, RenamingStorage)


@pytest.mark.parametrize("write", ["direct", "buffered", "dontcache"])
class TestLocalStorage(RenamingContract):
    @pytest.fixture
    def storage(self, tmp_path: Path, write) -> Storage:
        return LocalStorage(tmp_path / "runs" / "a", write=write)


class TestLocalStorageOnTmpfs(RenamingContract):
    """A file system without some of what disks have (RWF_DONTCACHE)."""

    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        shm = Path("/dev/shm")
        if not shm.is_dir():
            pytest.skip("no /dev/shm here")
        storage = LocalStorage(shm / f"shardckpt-test-{os.getpid()}-{uuid.uuid4().hex}" / "root")
        yield storage
        LocalStorage(shm).delete_tree(Path(storage.url).parent.name)


class TestFsspecInMemory(StorageContract):
    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        url = f"memory://contract/{uuid.uuid4().hex}"
        yield open_storage(url)
        open_storage("memory://contract").delete_tree(url.rpartition("/")[2])


class TestFsspecOnDisk(StorageContract):
    """fsspec's local file system stands for all that write files in their place (SFTP, SMB, HDFS)."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        from fsspec.implementations.local import LocalFileSystem

        return FsspecStorage(LocalFileSystem(), str(tmp_path / "root"), transfers=SMALL)


@pytest.mark.s3
class TestS3(StorageContract):
    @pytest.fixture
    def storage(self, s3_url: str, s3: S3Server) -> Storage:
        return s3.storage(s3_url + "/runs/a")


@pytest.mark.s3
class TestS3InParts(StorageContract):
    """The same, on every server, with limits so small that uploads in parts and several ranges at once happen."""

    @pytest.fixture
    def storage(self, any_s3: S3Server, place: Callable[[S3Server], str]) -> Storage:
        return any_s3.storage(place(any_s3), transfers=SMALL)


@pytest.mark.s3
class TestS3Direct(StorageContract):
    """Parts and ranges past s3fs, on every server."""

    @pytest.fixture
    def storage(self, any_s3: S3Server, place: Callable[[S3Server], str]) -> Iterator[Storage]:
        storage = any_s3.storage(place(any_s3), transfers=SMALL, client="direct")
        yield storage
        storage.close()


@pytest.mark.s3
class TestFsspecOnS3(StorageContract):
    """The storage for any file system of fsspec, on one that knows no conditional finish of what goes in parts."""

    @pytest.fixture
    def storage(self, s3_url: str, s3: S3Server) -> Storage:
        return FsspecStorage(s3.file_system, s3_url, transfers=SMALL)


class TestRetryingStorage(RenamingContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return RetryingStorage(MemoryStorage("contract"))


class TestRetryingAFlakyStorage(RenamingContract):
    """Every put and every read fails once at first, the put after it has arrived."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        lossy = FailingStorage(LocalStorage(tmp_path), on("put"), after=True)
        failing = FailingStorage(FailingStorage(lossy, on("read")), on("read_into", "size", "list", "delete_tree"))
        return RetryingStorage(failing, RetryPolicy(first_wait=timedelta(0)))

    def test_parts_may_come_from_an_iterator(self, storage: Storage) -> None:
        """But it cannot be run through twice: the failure of the one try is the caller's to know."""
        with pytest.raises(ConnectionError):
            storage.put("a", iter([b"1"]))
        storage.put("b", iter([b"1", b"2"]))
        assert storage.read("b") == b"12"

    def test_of_two_puts_one_inside_the_other_one_wins(self, storage: Storage) -> None:
        storage.put("the one whose answer is lost", [b""])
        super().test_of_two_puts_one_inside_the_other_one_wins(storage)


class TestWrappedStorage(RenamingContract):
    """All wrappers round each other: told to do nothing, they change nothing."""

    @pytest.fixture
    def storage(self) -> Storage:
        never = on("no such operation")
        storage = FailingStorage(GatedStorage(TornStorage(MemoryStorage("contract")), never), never)
        return RecordingStorage(CountingStorage(storage))


WRAPPERS = [StorageWrapper, FailingStorage, GatedStorage, TornStorage, RecordingStorage, CountingStorage]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_rename_exactly_if_the_inner_storage_does(wrap: type[StorageWrapper]) -> None:
    assert isinstance(wrap(MemoryStorage()), RenamingStorage)
    assert isinstance(wrap(wrap(MemoryStorage())), RenamingStorage)
    assert not isinstance(wrap(MemoryObjects()), RenamingStorage)
    assert isinstance(wrap(MemoryStorage()), wrap)
    assert isinstance(wrap(wrap(MemoryObjects())), SharedPuts)
    assert not isinstance(wrap(MemoryStorage()), SharedPuts)
    assert isinstance(RetryingStorage(wrap(MemoryStorage())), RenamingStorage)
    assert not isinstance(RetryingStorage(wrap(MemoryObjects())), RenamingStorage)
