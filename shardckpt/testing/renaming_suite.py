"""What a storage with folders must do: inherit `RenamingContract` and give the fixture `storage` one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.testing.storage_suite import StorageContract


class RenamingContract(StorageContract):
    """What a file system promises beyond that."""

    @pytest.fixture
    def folders(self, storage: Storage) -> RenamingStorage:
        assert isinstance(storage, RenamingStorage)
        return storage

    def test_make_folder(self, folders: RenamingStorage) -> None:
        folders.make_folder("a/b/c")
        assert folders.list("a/b") == ["c/"]
        assert folders.list("a/b/c") == []
        with pytest.raises(FileExistsError, match="a/b/c"):
            folders.make_folder("a/b/c")
        folders.make_folder("a/b/c", exist_ok=True)
        folders.put("file", [b""])
        with pytest.raises(FileExistsError):
            folders.make_folder("file", exist_ok=True)
        with pytest.raises(NotADirectoryError):
            folders.make_folder("file/below")

    def test_a_folder_and_a_file_cannot_share_a_name(self, folders: RenamingStorage) -> None:
        folders.put("d/f", [b"1"])
        with pytest.raises(FileExistsError):
            folders.put("d", [b"1"])
        with pytest.raises(NotADirectoryError):
            folders.put("d/f/g", [b"1"])
        with pytest.raises(OSError, match="d"):
            folders.replace("d", b"1")
        assert folders.list("d") == ["f"]
        assert folders.list() == ["d/"]

    def test_ranges_of_one_file_by_several_writers(self, folders: RenamingStorage) -> None:
        """In any order, at once, the first one into a folder that is not there yet."""
        ranges = [(0, b"a" * 8192), (8192, b"b" * 4096), (12288, b"c" * 5000)]
        with ThreadPoolExecutor(3) as pool:
            put = [pool.submit(folders.put_range, "d/f", at, [content[:7], content[7:]]) for at, content in ranges]
            assert sorted(future.result() for future in put) == [4096, 5000, 8192]
        assert folders.read("d/f") == b"".join(content for _, content in ranges)
        folders.put_range("d/late", 4096, [b"z"])
        assert folders.size("d/late") == 4097
        with pytest.raises(OSError, match="d"):
            folders.put_range("d", 0, [b"1"])

    def test_sync_folder(self, folders: RenamingStorage) -> None:
        folders.put("d/f", [b"1"])
        folders.sync_folder("d")
        folders.sync_folder("")
        with pytest.raises(FileNotFoundError, match="missing"):
            folders.sync_folder("missing")

    def test_rename_folder(self, folders: RenamingStorage) -> None:
        folders.put("step_1.x.tmp/sub/f", [b"1"])
        folders.put("other/f", [b"2"])
        folders.rename_folder("step_1.x.tmp", "step_1")
        assert folders.list() == ["other/", "step_1/"]
        assert folders.read("step_1/sub/f") == b"1"
        folders.rename_folder("step_1/sub", "other/sub")
        assert (folders.list("step_1"), folders.list("other")) == ([], ["f", "sub/"])

    def test_rename_folder_replaces_nothing(self, folders: RenamingStorage) -> None:
        folders.put("a/f", [b"1"])
        folders.put("full/f", [b"2"])
        folders.make_folder("empty")
        folders.put("file", [b"3"])
        for target in ("full", "empty", "file"):
            with pytest.raises(FileExistsError, match=target):
                folders.rename_folder("a", target)
        for source, target in (("missing", "b"), ("a", "missing/b")):
            with pytest.raises(FileNotFoundError, match="missing"):
                folders.rename_folder(source, target)
        with pytest.raises(OSError, match="file"):
            folders.rename_folder("file", "b")
        assert folders.list() == ["a/", "empty/", "file", "full/"]
        assert (folders.read("a/f"), folders.read("full/f"), folders.read("file")) == (b"1", b"2", b"3")

    def test_one_of_many_racing_renames_wins(self, folders: RenamingStorage) -> None:
        for rank in range(8):
            folders.put(f"try_{rank}/rank", [str(rank).encode()])
        start = threading.Barrier(8)

        def rename(rank: int) -> bool:
            start.wait(20)
            try:
                folders.rename_folder(f"try_{rank}", "step_1")
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(rename, range(8)))
        assert won.count(True) == 1
        assert folders.read("step_1/rank") == str(won.index(True)).encode()
        assert len(folders.list()) == 8

    def test_exchange_folders(self, folders: RenamingStorage) -> None:
        folders.put("step_1/f", [b"old"])
        folders.put("step_1.y.tmp/g", [b"new"])
        if folders.exchange_folders("step_1", "step_1.y.tmp"):
            assert (folders.list("step_1"), folders.list("step_1.y.tmp")) == (["g"], ["f"])
        else:
            assert (folders.list("step_1"), folders.list("step_1.y.tmp")) == (["f"], ["g"])
        with pytest.raises(FileNotFoundError, match="missing"):
            folders.exchange_folders("step_1", "missing")
        with pytest.raises(FileNotFoundError, match="missing"):
            folders.exchange_folders("missing", "step_1")

    def test_delete_tree_of_empty_folders(self, folders: RenamingStorage) -> None:
        folders.make_folder("a/b/c")
        folders.delete_tree("a")
        assert folders.list() == []

    def test_a_folder_cannot_lie_outside(self, folders: RenamingStorage) -> None:
        folders.make_folder("a")
        for key in ("../x", "/x", "a/../../x", "a//b", ".", "a\0"):
            calls: list[Callable[[], object]] = [
                partial(folders.make_folder, key),
                partial(folders.sync_folder, key),
                partial(folders.rename_folder, "a", key),
                partial(folders.rename_folder, key, "b"),
                partial(folders.exchange_folders, "a", key),
                partial(folders.exchange_folders, key, "a"),
            ]
            for call in calls:
                with pytest.raises(ValueError, match="not a storage key"):
                    call()
        assert folders.list() == ["a/"]
