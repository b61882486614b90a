"""What LocalStorage promises beyond the contract: links, leftovers, full disks, short transfers, modes, forks."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from shardckpt.storage import Buffer, LocalStorage, Read, WriteMethod
from shardckpt.storage.posix import syscalls
from shardckpt.testing.storage_suite import filled, ranges

PAGE = mmap.PAGESIZE


def aligned(content: bytes) -> memoryview:
    """The content in page-aligned memory."""
    memory = mmap.mmap(-1, max(1, len(content)))
    memory[: len(content)] = content
    return memoryview(memory)[: len(content)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(b"precious")
    return folder


class TestLinks:
    def test_nothing_goes_through_a_planted_folder(self, root: Path, outside: Path) -> None:
        root.mkdir()
        (root / "step_1").symlink_to(outside)
        storage = LocalStorage(root)
        calls = [
            lambda: storage.put("step_1/new", [b"x"]),
            lambda: storage.put("step_1/deep/new", [b"x"]),
            lambda: storage.replace("step_1/secret", b"x"),
            lambda: storage.read("step_1/secret"),
            lambda: ranges(storage, "step_1/secret", (0, 1)),
            lambda: storage.size("step_1/secret"),
            lambda: storage.list("step_1"),
            lambda: storage.delete(["step_1/secret"]),
            lambda: storage.delete_tree("step_1/secret"),
            lambda: storage.make_folder("step_1/folder"),
            lambda: storage.sync_folder("step_1"),
            lambda: storage.rename_folder("step_1", "step_2"),
            lambda: storage.exchange_folders("step_1", "step_1"),
        ]
        for call in calls:
            with pytest.raises(OSError, match="symbolic link") as caught:
                call()
            assert caught.value.errno == errno.ELOOP
        assert os.listdir(outside) == ["secret"]
        assert (outside / "secret").read_bytes() == b"precious"

    def test_nothing_goes_through_a_planted_file(self, root: Path, outside: Path) -> None:
        root.mkdir()
        (root / "a").symlink_to(outside / "secret")
        (root / "b").symlink_to(outside / "created")
        storage = LocalStorage(root)
        for key in ("a", "b"):
            with pytest.raises(FileExistsError):
                storage.put(key, [b"x"])
            for call in (storage.read, storage.size, lambda key: ranges(storage, key, (0, 1))):
                with pytest.raises(OSError, match="symbolic link"):
                    call(key)
        storage.replace("a", b"a file in the place of the link")
        assert not (root / "a").is_symlink()
        storage.delete(["b"])
        assert storage.list() == ["a"]
        assert os.listdir(outside) == ["secret"]
        assert (outside / "secret").read_bytes() == b"precious"

    def test_delete_tree_removes_links_and_follows_none(self, root: Path, outside: Path) -> None:
        storage = LocalStorage(root)
        storage.put("step_1/f", [b"1"])
        (root / "step_1" / "link").symlink_to(outside)
        (root / "latest").symlink_to("step_1")
        storage.delete_tree("step_1")
        storage.delete_tree("latest")
        assert storage.list() == []
        assert os.listdir(outside) == ["secret"]

    def test_a_link_is_listed_as_no_folder(self, root: Path) -> None:
        storage = LocalStorage(root)
        storage.make_folder("step_1")
        (root / "latest").symlink_to("step_1")
        assert storage.list() == ["latest", "step_1/"]

    def test_the_root_itself_may_be_a_link(self, root: Path, outside: Path) -> None:
        root.symlink_to(outside)
        storage = LocalStorage(root)
        storage.put("a/b", [b"1"])
        assert storage.read("a/b") == b"1"
        assert (outside / "a" / "b").read_bytes() == b"1"

    def test_a_planted_pipe_makes_nobody_wait(self, root: Path) -> None:
        root.mkdir()
        os.mkfifo(root / "pipe")
        storage = LocalStorage(root)
        for call in (storage.read, storage.size):
            with pytest.raises(OSError, match="neither a regular file nor a folder"):
                call("pipe")


class TestFailures:
    def test_a_failed_fsync_is_final(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No real device fails on demand here, so `os.fsync` does: once for the file, and the file is gone."""
        storage, synced = LocalStorage(root), []
        storage.make_folder("a")
        real = os.fsync

        def fsync(file: int) -> None:
            if stat.S_ISREG(os.fstat(file).st_mode):
                synced.append(file)
                raise OSError(errno.EIO, "Input/output error")
            real(file)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"cannot write 'a/f' in .*dmesg") as caught:
            storage.put("a/f", [filled(100_000)])
        assert caught.value.errno == errno.EIO
        assert len(synced) == 1
        with pytest.raises(OSError, match="a/g"):
            storage.replace("a/g", b"1")
        assert storage.list("a") == []

    def test_a_folder_that_cannot_be_synced_fails_the_put(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        storage = LocalStorage(root)
        storage.make_folder("a")
        real = os.fsync

        def fsync(file: int) -> None:
            if stat.S_ISDIR(os.fstat(file).st_mode):
                raise OSError(errno.EIO, "Input/output error")
            real(file)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="a/f"):
            storage.put("a/f", [b"1"])
        assert storage.list("a") == []

    def test_a_file_system_without_fsync_of_folders_is_no_failure(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.fsync

        def fsync(file: int) -> None:
            if stat.S_ISDIR(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "Invalid argument")
            real(file)

        monkeypatch.setattr(os, "fsync", fsync)
        storage = LocalStorage(root)
        storage.put("a/f", [b"1"])
        assert storage.read("a/f") == b"1"

    @pytest.mark.root
    @pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
    @pytest.mark.parametrize("write", ["direct", "buffered"])
    @pytest.mark.parametrize("known", [True, False], ids=["known-size", "unknown-size"])
    def test_a_full_disk(self, tmp_path: Path, write, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        real, written = os.pwritev, []

        def pwritev(*arguments) -> int:
            written.append(1)
            return real(*arguments)

        mount = tmp_path / "small"
        mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)], check=True, timeout=20)
        try:
            storage = LocalStorage(mount, write=write)
            storage.put("kept", [filled(1000)])
            parts = [aligned(filled(700_000)), aligned(filled(700_000))]
            monkeypatch.setattr(os, "pwritev", pwritev)
            with pytest.raises(OSError, match=r"cannot write 'a/big' in .*full.*fewer steps") as caught:
                storage.put("a/big", parts if known else iter(parts))
            assert caught.value.errno == errno.ENOSPC
            assert bool(written) is not known  # a known size is reserved before the first byte
            assert storage.list("a") == []
            storage.put("a/small", [filled(1000)])  # what the failed file took is free again
            assert storage.read("kept") == filled(1000)
        finally:
            subprocess.run(["umount", str(mount)], check=True, timeout=20)

    def test_the_root_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        storage = LocalStorage(tmp_path / "file")
        with pytest.raises(NotADirectoryError):
            storage.put("a", [b"1"])
        assert storage.list() == []


class TestTransfers:
    """The kernel may take or give less than it was asked for; here it always does."""

    @pytest.mark.parametrize("way", ["direct", "buffered", "dontcache"])
    @pytest.mark.parametrize("most", [1000, PAGE])
    def test_short_writes(self, root: Path, monkeypatch: pytest.MonkeyPatch, way, most: int) -> None:
        real = os.pwritev

        def pwritev(file: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            first = next(buffer for buffer in buffers if len(buffer))
            return real(file, [first[:most]], offset, flags)

        monkeypatch.setattr(os, "pwritev", pwritev)
        storage = LocalStorage(root, write=WriteMethod(way, threads=2, piece_nbytes=4 * PAGE))
        content = filled(10 * PAGE + 17)
        parts: list[Buffer] = [aligned(content[: 5 * PAGE]), aligned(content[5 * PAGE : 9 * PAGE]), content[9 * PAGE :]]
        assert storage.put("a", parts) == len(content)
        assert storage.read("a") == content

    def test_short_reads(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        storage, content, real = LocalStorage(root), filled(10_000), os.preadv
        storage.put("a", [content])
        monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: real(file, [buffers[0][:777]], offset))
        assert ranges(storage, "a", (0, 3000), (3000, 7000)) == [content[:3000], content[3000:]]

    @pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
    def test_dontcache_where_it_is_unknown(self, root: Path, monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
        real, refused = os.pwritev, []

        def pwritev(file: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            if flags:
                refused.append(offset)
                raise OSError(refusal, "unknown flag")
            return real(file, buffers, offset)

        monkeypatch.setattr(os, "pwritev", pwritev)
        storage = LocalStorage(root, write=WriteMethod("dontcache", threads=1, piece_nbytes=PAGE))
        storage.put("a", [filled(3 * PAGE)])
        assert storage.read("a") == filled(3 * PAGE)
        assert len(refused) == 1

    def test_dontcache_refused_in_two_threads_at_once(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real, both = os.pwritev, threading.Barrier(2)

        def pwritev(file: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            if flags:
                both.wait(20)
                raise OSError(errno.EOPNOTSUPP, "unknown flag")
            return real(file, buffers, offset)

        monkeypatch.setattr(os, "pwritev", pwritev)
        storage = LocalStorage(root, write=WriteMethod("dontcache", threads=2, piece_nbytes=PAGE))
        storage.put("a", [filled(2 * PAGE)])
        assert storage.read("a") == filled(2 * PAGE)

    def test_direct_where_only_opening_works(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.pwritev

        def pwritev(file: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "wants larger blocks")
            return real(file, buffers, offset, flags)

        monkeypatch.setattr(os, "pwritev", pwritev)
        storage = LocalStorage(root, write=WriteMethod("direct", threads=2, piece_nbytes=PAGE))
        storage.put("a", [aligned(filled(7 * PAGE))])
        assert storage.read("a") == filled(7 * PAGE)

    def test_direct_where_it_cannot_be_opened(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.open

        def open_(path: str, flags: int, *rest, **options) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no direct I/O here")
            return real(path, flags, *rest, **options)

        monkeypatch.setattr(os, "open", open_)
        storage = LocalStorage(root, write="direct")
        storage.put("a", [aligned(filled(7 * PAGE))])
        assert storage.read("a") == filled(7 * PAGE)

    def test_what_can_go_past_the_cache_does(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """All but the end of an image in page-aligned memory."""
        direct: list[tuple[int, int]] = []
        cached: list[tuple[int, int]] = []
        real = os.pwritev
        storage = LocalStorage(root, write=WriteMethod("direct", threads=1, piece_nbytes=2 * PAGE))
        storage.make_folder("a")
        try:
            os.close(os.open(root / "a" / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
        except OSError:
            pytest.skip("no direct I/O in the folder for temporary files")

        def pwritev(file: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            is_direct = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT
            (direct if is_direct else cached).append((offset, sum(map(len, buffers))))
            return real(file, buffers, offset, flags)

        monkeypatch.setattr(os, "pwritev", pwritev)
        storage.put("a/f", [aligned(filled(5 * PAGE + 10))])
        assert direct == [(0, 2 * PAGE), (2 * PAGE, 2 * PAGE), (4 * PAGE, PAGE)]
        assert cached == [(5 * PAGE, 10)]

    def test_neighbours_are_one_system_call(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        storage, real, calls = LocalStorage(root), os.preadv, []
        storage.put("a", [filled(10_000)])

        def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
            calls.append((offset, len(buffers)))
            return real(file, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        ranges(storage, "a", (0, 10), (20, 5), (10, 10), (5000, 1))
        assert sorted(calls) == [(0, 3), (5000, 1)]
        calls.clear()
        ranges(storage, "a", *((index, 1) for index in range(3000)))
        most = os.sysconf("SC_IOV_MAX")
        assert sorted(calls) == [(start, min(most, 3000 - start)) for start in range(0, 3000, most)]


def test_modes_follow_the_umask(root: Path) -> None:
    storage = LocalStorage(root)
    before = os.umask(0o027)
    try:
        storage.put("a/f", [b"1"])
        storage.replace("a/g", b"1")
        storage.make_folder("b")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((root / name).stat().st_mode) for name in ("a", "a/f", "a/g", "b", ".")}
    assert modes == {"a": 0o750, "a/f": 0o640, "a/g": 0o640, "b": 0o750, ".": 0o750}


def test_opening_touches_nothing_and_chdir_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("runs/a")
    assert storage.list() == []
    assert os.listdir(tmp_path) == []
    monkeypatch.chdir("/")
    storage.put("f", [b"1"])
    assert (tmp_path / "runs" / "a" / "f").read_bytes() == b"1"
    assert storage.path_of("x/y") == str(tmp_path / "runs" / "a" / "x" / "y")


def test_no_descriptor_and_no_thread_is_left(root: Path) -> None:
    storage = LocalStorage(root, write=WriteMethod("direct", threads=4, piece_nbytes=PAGE))
    storage.put("warm", [b"1"])
    gc.collect()  # or what earlier tests have left to the collector closes meanwhile
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()

    def broken():
        yield aligned(filled(8 * PAGE))
        raise ZeroDivisionError

    storage.put("a/f", [aligned(filled(64 * PAGE))])
    storage.put("a/many", [b"x"] * 5000)
    for index in range(100):
        storage.put(f"b/{index}", [b"1"])
    with pytest.raises(ZeroDivisionError):
        storage.put("a/g", broken())
    into = bytearray(100)
    storage.read_into([Read(f"b/{index}", 0, memoryview(into)[index : index + 1]) for index in range(100)])
    assert into == b"1" * 100
    with pytest.raises(EOFError):
        ranges(storage, "a/f", (0, 10), (65 * PAGE, 10))
    with pytest.raises(FileNotFoundError):
        storage.read_into([Read("a/f", 0, memoryview(into)), Read("missing", 0, memoryview(into))])
    with pytest.raises(FileExistsError):
        storage.rename_folder("a", "b")
    storage.delete_tree("a")
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (files, threads)


def test_a_child_made_by_fork_uses_it(root: Path) -> None:
    storage = LocalStorage(root, write=WriteMethod("direct", threads=4, piece_nbytes=PAGE))
    content = filled(40 * PAGE)
    storage.put("parent", [aligned(content)])
    child = os.fork()
    if child == 0:
        try:
            storage.put("child", [aligned(content)])
            os._exit(0 if ranges(storage, "parent", (0, len(content))) == [content] else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert storage.read("child") == content


class TestWithoutRenameat2:
    """NFS and older kernels know no flags: the name is looked at first."""

    @pytest.fixture
    def entry(self, tmp_path: Path):
        folder = os.open(tmp_path, os.O_RDONLY)
        yield lambda name: (folder, name)
        os.close(folder)

    def test_rename_takes_free_names_only(self, tmp_path: Path, entry) -> None:
        for name in ("a", "empty", "full/x"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "file").write_bytes(b"1")
        for target in ("empty", "full", "file"):
            with pytest.raises(FileExistsError):
                syscalls.rename_new(entry("a"), entry(target), rename=lambda *_: False)
        syscalls.rename_new(entry("a"), entry("b"), rename=lambda *_: False)
        assert sorted(os.listdir(tmp_path)) == ["b", "empty", "file", "full"]

    def test_a_folder_that_appears_after_the_look_is_not_replaced(
        self, tmp_path: Path, entry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a").mkdir()
        real = os.stat

        def stat_(*arguments, **options):
            try:
                return real(*arguments, **options)
            finally:
                (tmp_path / "b" / "full").mkdir(parents=True, exist_ok=True)

        monkeypatch.setattr(os, "stat", stat_)
        with pytest.raises(FileExistsError):
            syscalls.rename_new(entry("a"), entry("b"), rename=lambda *_: False)
        monkeypatch.undo()
        assert sorted(os.listdir(tmp_path)) == ["a", "b"]

    def test_exchange_says_no(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        storage = LocalStorage(root)
        storage.put("a/f", [b"1"])
        storage.put("b/g", [b"1"])
        monkeypatch.setattr(syscalls, "_libc", lambda: None)
        assert storage.exchange_folders("a", "b") is False
        storage.rename_folder("a", "c")
        assert (storage.list("b"), storage.list("c")) == (["g"], ["f"])


class TestDurability:
    """What a power cut must not undo is synced before the call returns: files, and folders whose names changed."""

    @pytest.fixture
    def synced(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        """Call it to get the paths synced since the last call."""
        real, paths = os.fsync, []

        def fsync(file: int) -> None:
            paths.append(os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), root))
            real(file)

        monkeypatch.setattr(os, "fsync", fsync)

        def take() -> list[str]:
            taken = paths.copy()
            paths.clear()
            return taken

        return take

    def test_every_change_of_a_folder_is_synced(self, root: Path, synced) -> None:
        storage = LocalStorage(root)
        storage.put("a/b/f", [b"1"])
        assert synced() == ["..", ".", "a", "a/b/f", "a/b"]
        storage.put("a/b/g", [b"1"])
        assert synced() == ["a/b/g", "a/b"]
        storage.make_folder("a/c/d")
        assert synced() == [".", "a", "a/c"]
        storage.make_folder("a/c/d", exist_ok=True)  # perhaps made by another rank a moment ago
        assert synced() == ["a/c"]
        storage.sync_folder("a/c")
        assert synced() == ["a/c"]
        storage.rename_folder("a/b", "b")
        assert sorted(synced()) == [".", "a"]
        storage.exchange_folders("b", "a/c")
        assert sorted(synced()) == [".", "a"]
        storage.replace("a/c/f", b"22")
        file, folder = synced()
        assert file.startswith("a/c/f.")
        assert folder == "a/c"
        storage.delete(["a/c/f", "missing/x"])
        assert synced() == ["a/c"]
        storage.delete_tree("a")
        assert synced() == ["."]
        assert synced() == []
