"""What FsspecStorage promises beyond the contract: nothing half published, lost answers, forks, caches, error words."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import uuid
from datetime import timedelta
from pathlib import Path

import fsspec
import pytest

from shardckpt.storage import FsspecStorage, RetryPolicy, S3Storage, Storage, Transfers, is_transient, open_storage
from shardckpt.storage.objects.translate import translate
from shardckpt.storage.objects.upload import ObjectUpload
from shardckpt.testing.storage_suite import filled, ranges
from tests.storage.s3server import S3Server

IN_PARTS = Transfers(whole_nbytes=6 << 20, part_nbytes=5 << 20)


@pytest.fixture
def memory() -> FsspecStorage:
    storage = open_storage(f"memory://fsspec-tests/{uuid.uuid4().hex}")
    assert isinstance(storage, FsspecStorage)
    return storage


def lossy_memory(*, foreign: bytes | None = None):
    """A seemingly remote file system that does a put, loses the answer, repeats the put, and is refused by itself.

    With `foreign`, another writer's content arrives at the same moment and is first.
    """
    from fsspec.implementations.memory import MemoryFileSystem

    class Lossy(MemoryFileSystem):  # type: ignore[misc]
        async_impl = True  # what tells a remote client
        protocol = "lossy"

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            super().pipe_file(path, value if foreign is None else foreign, mode=mode, **kwargs)
            raise FileExistsError(path)

        def cat_ranges(self, *arguments, batch_size=None, **options):
            return super().cat_ranges(*arguments, **options)

    return Lossy(global_store=False, skip_instance_cache=True)


class TestLostAnswers:
    def test_a_put_refused_by_its_own_first_try_succeeds(self) -> None:
        storage = FsspecStorage(lossy_memory(), "/root")
        assert storage.put("a", [b"one", b"two"]) == 6
        assert storage.read("a") == b"onetwo"
        with pytest.raises(FileExistsError):
            storage.put("a", [b"one", b"two"])  # this one found it there when it began

    @pytest.mark.parametrize("foreign", [b"OneTwo", b"one"], ids=["same-size", "other-size"])
    def test_a_put_refused_by_another_writers_fails(self, foreign: bytes) -> None:
        storage = FsspecStorage(lossy_memory(foreign=foreign), "/root")
        with pytest.raises(FileExistsError, match="'a'"):
            storage.put("a", [b"onetwo"])
        assert storage.read("a") == foreign


@pytest.mark.s3
class TestOnS3:
    @pytest.fixture
    def storage(self, s3: S3Server, s3_url: str) -> FsspecStorage:
        return s3.storage(s3_url, transfers=IN_PARTS)

    def test_an_abandoned_upload_leaves_nothing_to_pay_for(self, s3: S3Server, storage: Storage) -> None:
        def parts():
            yield filled(12 << 20)
            uploads.extend(s3.file_system.list_multipart_uploads(s3.bucket))
            raise ZeroDivisionError

        uploads: list = []
        with pytest.raises(ZeroDivisionError):
            storage.put("a/half", parts())
        assert any(upload["Key"].endswith("a/half") for upload in uploads)
        assert not any(up["Key"].endswith("a/half") for up in s3.file_system.list_multipart_uploads(s3.bucket))
        assert storage.list("a") == []

    def test_a_large_object_that_appears_meanwhile_is_not_replaced(self, s3: S3Server, storage: Storage) -> None:
        def parts():
            yield filled(7 << 20)
            storage.put("a", [b"the other writer was faster"])
            yield b"end"

        with pytest.raises(FileExistsError, match="write-once"):
            storage.put("a", parts())
        assert storage.read("a") == b"the other writer was faster"
        assert not any(up["Key"].endswith("/a") for up in s3.file_system.list_multipart_uploads(s3.bucket))

    def test_a_wrong_bucket_is_named(self, s3: S3Server) -> None:
        storage = open_storage("s3://no-such-bucket/x", storage_options=s3.options)
        with pytest.raises(FileNotFoundError, match=r"s3://no-such-bucket/x.*bucket"):
            storage.put("a", [b"1"])
        assert storage.list() == []

    def test_a_key_with_a_version_in_it_is_refused(self, storage: Storage) -> None:
        for call in (storage.read, storage.size, lambda key: storage.put(key, [b"1"])):
            with pytest.raises(ValueError, match="versionId"):
                call("a?versionId=1")

    def test_more_keys_than_one_request_may_hold(self, storage: Storage) -> None:
        storage.put("d/0", [b"1"])
        storage.put("d/1500", [b"1"])
        storage.delete(f"d/{index}" for index in range(1501))
        assert storage.list("d") == []

    def test_a_delete_that_the_server_refuses_is_an_error(self, s3: S3Server, s3_url: str) -> None:
        """s3fs's own bulk delete would say nothing. No server here refuses single keys, so the client is told."""

        class Refusing(type(s3.file_system)):  # type: ignore[misc]
            def call_s3(self, method, *arguments, **options):
                if method == "delete_objects":
                    return {"Errors": [{"Key": "d/1", "Code": "AccessDenied", "Message": "no"}]}
                return super().call_s3(method, *arguments, **options)

        storage = S3Storage(Refusing(**s3.options, skip_instance_cache=True), s3_url)
        with pytest.raises(PermissionError, match="AccessDenied"):
            storage.delete(["d/1"])

    def test_a_server_that_is_not_there(self, s3: S3Server) -> None:
        nowhere = open_storage("s3://bucket/x", storage_options={**s3.options, "endpoint_url": "http://127.0.0.1:9"})
        assert isinstance(nowhere, S3Storage)
        storage = S3Storage(nowhere._client(), "s3://bucket/x", retries=RetryPolicy(tries=2, first_wait=timedelta(0)))
        with pytest.raises(ConnectionError, match=r"cannot look at 'a' in s3://bucket/x: .*endpoint_url") as caught:
            storage.size("a")
        assert storage.retries == 1
        assert is_transient(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None

    def test_a_child_made_by_fork_makes_its_own_client(self, s3: S3Server, s3_url: str) -> None:
        storage = open_storage(s3_url, storage_options=s3.options)
        storage.put("parent", [b"from the parent"])
        child = os.fork()
        if child == 0:
            try:
                good = storage.read("parent") == b"from the parent" and storage.put("child", [b"from the child"]) == 14
                os._exit(0 if good else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert storage.read("child") == b"from the child"

    def test_after_close_it_connects_anew(self, s3: S3Server, s3_url: str) -> None:
        storage = open_storage(s3_url, storage_options=s3.options)
        storage.put("a", [b"1"])
        storage.close()
        assert storage.read("a") == b"1"
        storage.close()

    def test_a_listings_cache_of_the_callers_file_system_hides_nothing(self, s3: S3Server, s3_url: str) -> None:
        import s3fs

        cached = s3fs.S3FileSystem(**s3.options, use_listings_cache=True, skip_instance_cache=True)
        one, other = FsspecStorage(cached, s3_url), FsspecStorage(s3.file_system, s3_url)
        one.put("d/1", [b"1"])
        assert one.list("d") == ["1"]
        other.put("d/2", [b"22"])
        assert one.size("d/2") == 2
        assert one.list("d") == ["1", "2"]
        other.replace("d/2", b"333")
        assert one.size("d/2") == 3
        assert one.list("d") == ["1", "2"]
        other.delete(["d/1"])
        with pytest.raises(FileNotFoundError):
            one.size("d/1")
        assert one.list("d") == ["2"]


class TestInPlaceBackEnds:
    """fsspec's local file system, which like SFTP publishes while it writes."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        from fsspec.implementations.local import LocalFileSystem

        return FsspecStorage(LocalFileSystem(), str(tmp_path / "root"))

    def test_a_failed_write_leaves_no_file(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        from fsspec.implementations.local import LocalFileOpener

        def write(self, data):
            self.f.write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(LocalFileOpener, "write", write)
        with pytest.raises(OSError, match="a/f") as caught:
            storage.put("a/f", [filled(100)])
        assert caught.value.errno == errno.ENOSPC
        assert storage.list("a") == []

    def test_a_link_is_deleted_not_followed(self, storage: Storage, tmp_path: Path) -> None:
        storage.put("a/f", [b"1"])
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "precious").write_bytes(b"1")
        (tmp_path / "root" / "a" / "link").symlink_to(tmp_path / "outside")
        storage.delete_tree("a")
        assert storage.list() == []
        assert os.listdir(tmp_path / "outside") == ["precious"]


def test_it_is_not_pickled(memory: FsspecStorage) -> None:
    with pytest.raises(TypeError, match="credentials"):
        pickle.dumps(memory)


def test_a_gated_put_does_not_hold_up_others(memory: FsspecStorage) -> None:
    """Parts are filled before anything is locked."""
    release, begun = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert release.wait(20)
        yield b"slow"

    thread = threading.Thread(target=lambda: memory.put("slow", slow()))
    thread.start()
    assert begun.wait(20)
    memory.put("quick", [b"1"])
    release.set()
    thread.join(20)
    assert memory.list() == ["quick", "slow"]


def test_an_abandoned_upload_is_not_published_by_the_garbage_collector() -> None:
    """fsspec's own `discard` does nothing (as in adlfs), and its files close, and so publish, when they are dropped."""
    published = []

    class File(fsspec.spec.AbstractBufferedFile):  # type: ignore[misc]
        def _upload_chunk(self, final=False):
            published.append(final)
            return True

    class Fs(fsspec.AbstractFileSystem):  # type: ignore[misc]
        def _open(self, path, mode="rb", block_size=None, autocommit=True, cache_options=None, **options):
            return File(self, path, mode, block_size)

    for end, wanted in ((ObjectUpload.finish, [True]), (ObjectUpload.abandon, [])):
        published.clear()
        upload = ObjectUpload(Fs(skip_instance_cache=True), "a", part_nbytes=5 << 20)
        upload.write(memoryview(b"half"))
        end(upload)
        upload._file.close()  # what its __del__ does
        assert published == wanted


def test_putting_into_fsspecs_memory_is_one_at_a_time(memory: FsspecStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks and writes in two steps, so two threads could both find the key free."""
    fs, free = memory._client(), []

    def look() -> None:
        free.append(memory._puts.acquire(blocking=False))
        if free[-1]:
            memory._puts.release()

    def pipe_file(*arguments, **options) -> None:
        other = threading.Thread(target=look)
        other.start()
        other.join(20)

    monkeypatch.setattr(type(fs), "pipe_file", pipe_file)
    memory.put("a", [b"1"])
    memory.replace("a", b"1")
    assert free == [False, False]


def test_ranges_in_waves(memory: FsspecStorage) -> None:
    fs = memory._client()
    storage = FsspecStorage(fs, "waves-" + uuid.uuid4().hex, transfers=Transfers(request_nbytes=100, wave_nbytes=300))
    content = filled(5000)
    storage.put("a", [content])
    calls: list[int] = []
    real = fs.cat_ranges

    def cat_ranges(paths, *rest, **options):
        calls.append(len(paths))
        return real(paths, *rest, **options)

    fs.cat_ranges = cat_ranges
    assert ranges(storage, "a", (0, 1000), (2000, 50)) == [content[:1000], content[2000:2050]]
    assert calls == [3, 3, 3, 2]


class _ServiceError(Exception):
    def __init__(self, code: str, status: int) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("code", "status", "wanted", "transient"),
    [
        ("PreconditionFailed", 412, FileExistsError, False),
        ("ConditionalRequestConflict", 409, OSError, True),
        ("SlowDown", 503, OSError, True),
        ("InternalError", 500, OSError, True),
        ("EntityTooLarge", 400, OSError, False),
    ],
)
def test_what_services_answer(code: str, status: int, wanted: type[OSError], transient: bool) -> None:
    """As SeaweedFS and Ceph end in s3fs: `OSError(EINVAL)` whose cause knows more."""
    answer = OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")
    answer.__cause__ = _ServiceError(code, status)
    error = translate(answer, "cannot put 'a'", str)
    assert isinstance(error, wanted)
    assert str(error).count("cannot put 'a'") == 1
    assert is_transient(error) is transient


@pytest.mark.parametrize(
    ("error", "wanted", "transient"),
    [
        (TimeoutError("slow"), TimeoutError, True),
        (ConnectionResetError("gone"), ConnectionError, True),
        (type("ReadTimeoutError", (Exception,), {})("slow"), TimeoutError, True),
        (type("ClientError", (Exception,), {"__module__": "aiohttp.client_exceptions"})("x"), ConnectionError, True),
        (type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})("x"), PermissionError, False),
        (NotImplementedError("no"), OSError, False),
        (RuntimeError("odd"), OSError, False),
        (PermissionError("no"), PermissionError, False),
    ],
)
def test_what_libraries_raise(error: Exception, wanted: type[OSError], transient: bool) -> None:
    translated = translate(error, "cannot read 'a' in s3://b", str)
    assert isinstance(translated, wanted)
    assert isinstance(translated, OSError)
    assert "cannot read 'a' in s3://b: " in str(translated)
    assert translated.errno
    assert is_transient(translated) is transient


def test_bugs_are_not_disguised() -> None:
    bug = TypeError("unexpected argument")
    assert translate(bug, "what", str) is bug
