"""Google's and Microsoft's object stores, each by an emulator of its own, through fsspec's clients for them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
import torch

import shardckpt as sc
from shardckpt.storage import FsspecStorage, Storage, Transfers, open_storage
from shardckpt.testing.servers import gcs
from shardckpt.testing.servers.azurite import BlobServer
from shardckpt.testing.servers.gcs import GcsServer
from shardckpt.testing.storage_suite import StorageContract, filled

SMALL = Transfers(whole_nbytes=12 << 20, part_nbytes=5 << 20, request_nbytes=1 << 20, wave_nbytes=4 << 20)


@pytest.fixture(scope="session")
def gcs_storage(gcs_server: GcsServer) -> Storage:
    return open_storage(f"gs://{gcs_server.bucket}", storage_options=gcs_server.options)


@pytest.fixture(scope="session")
def azure_storage(azure_server: BlobServer) -> Storage:
    storage = open_storage("az://checkpoints", storage_options=azure_server.options)
    storage._client().mkdir("checkpoints")
    return storage


@pytest.mark.leaks(threads=("gcsfs-",), why="of gcsfs, which closes files that were dropped; one for all")
class TestGcs(StorageContract):
    @pytest.fixture
    def storage(self, gcs_storage: FsspecStorage) -> Storage:
        return FsspecStorage(gcs_storage._client(), f"gs://checkpoints/{uuid.uuid4().hex}", transfers=SMALL)


class TestAzure(StorageContract):
    @pytest.fixture
    def storage(self, azure_storage: FsspecStorage) -> Storage:
        return FsspecStorage(azure_storage._client(), f"az://checkpoints/{uuid.uuid4().hex}", transfers=SMALL)

    @pytest.mark.parametrize("nbytes", [10, 20 << 20], ids=["small", "large"])
    def test_parts_that_fail_leave_nothing(self, storage: Storage, nbytes: int) -> None:
        """Nothing to be seen; but blocks that were sent stay for a week, and Azurite takes the name for taken."""
        if nbytes < SMALL.whole_nbytes:
            super().test_parts_that_fail_leave_nothing(storage, nbytes)
            return

        def parts() -> Iterator[bytes]:
            yield filled(nbytes)
            raise ValueError("the caller's own trouble")

        with pytest.raises(ValueError, match="own trouble"):
            storage.put("a/half", parts())
        assert storage.list("a") == []
        with pytest.raises(FileNotFoundError):
            storage.read("a/half")
        with pytest.raises(FileExistsError, match="'a/half'"):
            storage.put("a/half", [b"whole"])
        assert storage.list("a") == []


ANSWERS = {"gs": True, "gs, plain emulator": False, "az": True}
"""By server: whether it refuses a put of what is there."""


@pytest.fixture(scope="session", params=ANSWERS)
def each(request: pytest.FixtureRequest) -> tuple[str, FsspecStorage]:
    name = {"gs": "gcs_storage", "az": "azure_storage"}.get(request.param, "careless_storage")
    return request.param, request.getfixturevalue(name)


@pytest.fixture(scope="session")
def careless_storage(gcs_storage: FsspecStorage) -> Iterator[Storage]:
    """On a server that overwrites what it is told to create."""
    with gcs.running(conditions=False) as server:
        yield open_storage(f"gs://{server.bucket}", storage_options=server.options)


@pytest.mark.leaks(threads=("gcsfs-",), why="of gcsfs, which closes files that were dropped; one for all")
class TestWriteOnce:
    def test_what_each_server_answers_to_the_probe(self, each: tuple[str, FsspecStorage]) -> None:
        name, storage = each
        place = FsspecStorage(storage._client(), f"{storage.url}/{uuid.uuid4().hex}")
        assert place.refuses_to_replace() is ANSWERS[name]
        assert place.list() == []
        asked = CountingCalls(place)
        assert place.refuses_to_replace() is ANSWERS[name]
        assert asked.count == 0

    def test_of_two_that_found_it_free_one_is_told(self, each: tuple[str, FsspecStorage]) -> None:
        """The other comes after the look and before the put; on a careless server, between the put and its reading."""
        name, storage = each
        place = FsspecStorage(storage._client(), f"{storage.url}/{uuid.uuid4().hex}")
        other = FsspecStorage(storage._client(), place.url)
        other.put("made so that its questions are over", [b""])
        real, path = place._call, place._path("record")

        def call(what, work, **options):
            if "cannot put" not in what:
                return real(what, work, **options)
            if ANSWERS[name]:
                other.put("record", [b"the other"])
                return real(what, work, **options)
            done = real(what, work, **options)
            place._client().pipe_file(path, b"the other")
            return done

        place._call = call
        with pytest.raises(FileExistsError, match="'record'"):
            place.put("record", [b"mine"])
        assert other.read("record") == b"the other"


class CountingCalls:
    def __init__(self, storage: FsspecStorage) -> None:
        self.count, self._real = 0, storage._call
        storage._call = self

    def __call__(self, *arguments, **options):
        self.count += 1
        return self._real(*arguments, **options)


@pytest.mark.leaks(threads=("gcsfs-",), why="of gcsfs, which closes files that were dropped; one for all")
def test_a_wrong_bucket_is_named(each: tuple[str, FsspecStorage]) -> None:
    name, storage = each
    place = FsspecStorage(storage._client(), f"{name[:2]}://no-such-bucket/x")
    for content in (b"1", filled(9 << 20)):
        with pytest.raises(FileNotFoundError, match=r"://no-such-bucket/x.*bucket or container"):
            place.put("a", [content])


@pytest.mark.leaks(threads=("gcsfs-",), why="of gcsfs, which closes files that were dropped; one for all")
def test_save_and_resume(each: tuple[str, FsspecStorage]) -> None:
    """With another file system for the second run, which knows nothing of the first."""
    _, storage = each
    place = f"{storage.url}/{uuid.uuid4().hex}"
    weights = torch.arange(1000, dtype=torch.float32)
    first, second = (FsspecStorage(storage._client(), place) for _ in range(2))
    with sc.CheckpointManager(second) as later:
        assert later.steps() == []
        with sc.CheckpointManager(first, keep=sc.KeepLast(2)) as manager:
            for step in (1, 2, 3):
                manager.save(step, {"weights": weights * step}).result()
        assert later.steps() == [2, 3]
        loaded = {"weights": torch.zeros(1000)}
        info = later.resume(loaded)
        assert info is not None
        assert (info.step, torch.equal(loaded["weights"], weights * 3)) == (3, True)
