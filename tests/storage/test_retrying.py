"""What is tried again, how long, and how a put recognises itself."""

from __future__ import annotations

import errno
import threading
from datetime import timedelta

import pytest

from shardckpt.storage import (
    MemoryObjects,
    MemoryStorage,
    Read,
    RenamingStorage,
    RetryingStorage,
    RetryPolicy,
    StorageWrapper,
    is_transient,
)
from shardckpt.testing.faults import FailingStorage, RecordingStorage, on

AT_ONCE = RetryPolicy(tries=5, first_wait=timedelta(0), longest_wait=timedelta(0))


def retrying(inner, policy: RetryPolicy = AT_ONCE) -> RetryingStorage:
    return RetryingStorage(inner, policy)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError(), True),
        (BrokenPipeError(), True),
        (TimeoutError(), True),
        (OSError(errno.ESTALE, ""), True),
        (OSError(errno.EAGAIN, ""), True),
        (OSError(errno.EBUSY, ""), True),
        (OSError(errno.EIO, ""), False),
        (OSError(errno.ENOSPC, ""), False),
        (PermissionError(errno.EACCES, ""), False),
        (FileNotFoundError(errno.ENOENT, ""), False),
        (EOFError(), False),
        (ValueError(), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_passes_by_itself(error: BaseException, transient: bool) -> None:
    assert is_transient(error) is transient


def test_idempotent_operations_are_tried_again() -> None:
    names = ("read", "read_into", "size", "list", "delete", "delete_tree", "replace", "put")
    inner = MemoryStorage()
    inner.put("a", [b"abc"])
    log = RecordingStorage(inner)
    failing: StorageWrapper = log
    for name in names:
        failing = FailingStorage(failing, on(name), times=2)
    storage = retrying(failing)
    into = bytearray(2)
    assert storage.read("a") == b"abc"
    storage.read_into([Read("a", 1, memoryview(into))])
    assert into == b"bc"
    assert storage.size("a") == 3
    assert storage.list() == ["a"]
    storage.put("b", [b"1"])
    storage.replace("b", b"2")
    storage.delete(iter(["a"]))
    storage.delete_tree("b")
    assert storage.retries == 2 * len(names)
    assert sorted(operation.name for operation in log.operations) == sorted(names)


def test_renames_and_syncs_are_never_tried_again() -> None:
    log = RecordingStorage(MemoryStorage())
    storage = retrying(FailingStorage(log, on("rename_folder", "exchange_folders", "sync_folder"), times=None))
    assert isinstance(storage, RenamingStorage)
    storage.make_folder("a")
    for call in (
        lambda: storage.rename_folder("a", "b"),
        lambda: storage.exchange_folders("a", "a"),
        lambda: storage.sync_folder("a"),
    ):
        with pytest.raises(ConnectionError):
            call()
    assert storage.retries == 0
    assert [operation.name for operation in log.operations] == ["make_folder"]


def test_make_folder_is_tried_again_if_it_may_be_there() -> None:
    storage = retrying(FailingStorage(MemoryStorage(), on("make_folder"), after=True))
    assert isinstance(storage, RenamingStorage)
    storage.make_folder("a", exist_ok=True)
    assert storage.retries == 1
    other = retrying(FailingStorage(MemoryStorage(), on("make_folder"), after=True))
    assert isinstance(other, RenamingStorage)
    with pytest.raises(ConnectionError):
        other.make_folder("a")


def test_what_will_not_pass_is_not_tried_again() -> None:
    full = FailingStorage(MemoryStorage(), on("put"), times=None, error=lambda: OSError(errno.ENOSPC, "full"))
    storage = retrying(full)
    with pytest.raises(OSError, match="full"):
        storage.put("a", [b"1"])
    with pytest.raises(FileNotFoundError):
        storage.read("missing")
    assert (storage.retries, full.failed) == (0, 1)


def test_it_gives_up_after_so_many_tries_with_the_last_error() -> None:
    failing = FailingStorage(MemoryStorage(), on("list"), times=None)
    storage = retrying(failing)
    with pytest.raises(ConnectionResetError, match="injected"):
        storage.list()
    assert (failing.failed, storage.retries) == (5, 4)


def test_it_begins_no_try_that_would_end_after_the_deadline() -> None:
    failing = FailingStorage(MemoryStorage(), on("list"), times=None)
    storage = retrying(failing, RetryPolicy(first_wait=timedelta(0), deadline=timedelta(0)))
    with pytest.raises(ConnectionResetError):
        storage.list()
    assert failing.failed == 1


def test_close_ends_the_waiting() -> None:
    failing = FailingStorage(MemoryStorage(), on("list"), times=None)
    long = timedelta(hours=1)
    storage = retrying(failing, RetryPolicy(first_wait=long, longest_wait=long, deadline=10 * long))
    raised: list[BaseException] = []

    def work() -> None:
        try:
            storage.list()
        except ConnectionError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    storage.close()  # before or during the wait
    thread.join(20)
    assert not thread.is_alive()
    assert len(raised) == 1


class TestPut:
    def test_a_put_whose_answer_was_lost_succeeds(self) -> None:
        inner = MemoryObjects()
        storage = retrying(FailingStorage(inner, on("put"), after=True))
        assert storage.put("a", [b"one", b"two"]) == 6
        assert (inner.read("a"), storage.retries) == (b"onetwo", 1)

    def test_also_if_the_reading_back_fails_once(self) -> None:
        lost = FailingStorage(MemoryObjects(), on("put"), after=True)
        storage = retrying(FailingStorage(lost, on("read_into")))
        assert storage.put("a", [b"one"]) == 3
        assert storage.retries == 2

    def test_another_writers_object_is_not_taken_for_ours(self) -> None:
        """The first try fails before it arrives; in the meantime somebody else creates the key."""
        inner = MemoryObjects()

        def taken() -> ConnectionError:
            inner.put("a", [b"ONE"])
            return ConnectionResetError()

        storage = retrying(FailingStorage(inner, on("put"), error=taken))
        with pytest.raises(FileExistsError):
            storage.put("a", [b"one"])
        assert inner.read("a") == b"ONE"

    def test_a_first_try_that_is_refused_is_refused(self) -> None:
        storage = retrying(MemoryObjects())
        storage.put("a", [b"same"])
        with pytest.raises(FileExistsError):
            storage.put("a", [b"same"])
        assert storage.retries == 0

    def test_what_cannot_be_run_through_twice_is_tried_once(self) -> None:
        failing = FailingStorage(MemoryObjects(), on("put"))
        storage = retrying(failing)
        with pytest.raises(ConnectionError):
            storage.put("a", iter([b"1"]))
        assert storage.put("a", iter([b"1"])) == 1
        assert storage.retries == 0

    def test_the_callers_own_error_is_not_a_reason(self) -> None:
        tries = []

        class Parts(list):
            def __iter__(self):
                tries.append(1)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            retrying(MemoryObjects()).put("a", Parts([b"1"]))
        assert len(tries) == 1
