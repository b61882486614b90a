"""What S3Storage promises beyond the contract: lost answers, busy and broken servers, refusals, shared uploads."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar

import pytest

from shardckpt.storage import MemoryObjects, Read, RetryPolicy, S3Storage, SharedPuts, Transfers, is_transient
from shardckpt.storage.objects import requests
from shardckpt.storage.objects.parts import cut, nbytes_of, sizes
from shardckpt.storage.objects.writeonce import WriteOnce
from shardckpt.storage.transfer.summing import SummingStorage
from shardckpt.testing.storage_suite import filled, ranges
from tests.storage import proxy
from tests.storage.proxy import Harm, Proxy
from tests.storage.s3server import S3Server

IN_PARTS = Transfers(whole_nbytes=6 << 20, part_nbytes=5 << 20, request_nbytes=1 << 20, wave_nbytes=20 << 20)
QUICK = RetryPolicy(tries=6, first_wait=timedelta(milliseconds=1), longest_wait=timedelta(milliseconds=20))

MiB = 1 << 20

PASSING = (
    Harm.SLOW_DOWN, Harm.BUSY, Harm.BROKEN, Harm.RESET, Harm.LOST, Harm.ERROR_INSIDE, Harm.GARBAGE,
)  # fmt: skip

ANSWERS = {"moto": (True, True), "seaweedfs": (True, True)}
"""By server: whether it refuses to create what is there, by a put and at the end of an upload in parts."""


@pytest.mark.s3
def test_what_each_server_answers_to_the_probe(
    any_s3: S3Server, place: Callable[[S3Server], str], request: pytest.FixtureRequest
) -> None:
    """Printed for a server that was given; whatever it answers, it must leave nothing there."""
    storage = any_s3.storage(place(any_s3))
    probe = WriteOnce(storage._root)
    answers = tuple(ask(lambda work: storage._call("cannot probe", work)) for ask in (probe.of_puts, probe.of_uploads))
    name = request.node.callspec.params["any_s3"]
    print(f"{name}: refuses to create what is there by a put: {answers[0]}, by an upload in parts: {answers[1]}")
    assert answers == ANSWERS.get(name, answers)
    assert storage.list() == []
    assert storage.list_uploads() == []


@pytest.fixture(scope="module")
def wire(seaweedfs: S3Server) -> Iterator[tuple[Proxy, S3Server]]:
    """The proxy, and the server as it is seen through it."""
    with proxy.before(seaweedfs.endpoint) as harmful:
        through = S3Server(harmful.endpoint, seaweedfs.bucket, seaweedfs.access_key, seaweedfs.secret_key)
        yield harmful, through


@pytest.mark.s3
@pytest.mark.leaks(threads=("Thread-",), why="the proxy's, one for each connection that a client keeps")
class TestFaults:
    @pytest.fixture
    def harmful(self, wire: tuple[Proxy, S3Server]) -> Proxy:
        wire[0].heal()
        return wire[0]

    @pytest.fixture(params=["s3fs", "direct"])
    def storage(
        self, wire: tuple[Proxy, S3Server], harmful: Proxy, request: pytest.FixtureRequest
    ) -> Iterator[S3Storage]:
        url = f"s3://{wire[1].bucket}/{uuid.uuid4().hex}"
        storage = wire[1].storage(url, transfers=IN_PARTS, retries=QUICK, client=request.param)
        storage.put("first", [b"the probe is over"])
        storage.put("large/first", [filled(7 * MiB)])
        harmful.heal()
        yield storage
        storage.close()

    @pytest.mark.parametrize("harm", PASSING)
    def test_everything_goes_on_after_a_passing_fault(self, harmful: Proxy, storage: S3Storage, harm: Harm) -> None:
        kinds = ["put", "create_upload", "part", "complete", "get", "list", "head", "delete_objects", "delete"]
        if harm in (Harm.ERROR_INSIDE, Harm.GARBAGE):
            kinds.remove("delete")  # of a marker, which S3 answers with nothing
        for kind in kinds:
            harmful.harm(harm, kind, times=2)
        content = filled(12 * MiB, seed=2)
        assert storage.put("small", [b"1", b"23"]) == 3
        assert storage.put("large/it", [memoryview(content)]) == len(content)
        assert storage.read("small") == b"123"
        assert ranges(storage, "large/it", (0, 11 * MiB), (12 * MiB - 5, 5)) == [content[: 11 * MiB], content[-5:]]
        assert storage.list("large") == ["first", "it"]
        assert storage.size("large/it") == len(content)
        storage.delete(["small"])
        storage.delete_tree("large")
        assert storage.list() == ["first"]
        assert storage.list_uploads() == []
        # aiohttp repeats by itself what breaks on a connection that it used before, once.
        assert storage.retries >= len(kinds) * (1 if harm in (Harm.RESET, Harm.LOST) else 2)

    def test_an_answer_that_breaks_off_is_asked_for_again(self, harmful: Proxy, storage: S3Storage) -> None:
        harmful.harm(Harm.TRUNCATED, "get", times=3)
        assert ranges(storage, "large/first", (0, 7 * MiB)) == [filled(7 * MiB)]
        assert storage.read("first") == b"the probe is over"
        assert storage.retries == 3

    def test_what_was_summed_up_before_an_answer_broke_off_is_forgotten(
        self, harmful: Proxy, storage: S3Storage
    ) -> None:
        harmful.harm(Harm.TRUNCATED, "get", times=3)
        content, extents = filled(7 * MiB), [(3, 5 * MiB), (0, 3), (5 * MiB + 3, 0), (5 * MiB + 3, 2 * MiB - 3)]
        reads = [Read("large/first", at, memoryview(bytearray(nbytes))) for at, nbytes in extents]
        assert isinstance(storage, SummingStorage)
        assert storage.read_summed(reads) == [zlib.crc32(content[at : at + nbytes]) for at, nbytes in extents]
        assert [bytes(read.into) for read in reads] == [content[at : at + nbytes] for at, nbytes in extents]
        assert storage.retries == 3

    @pytest.mark.parametrize("harm", [Harm.STALL, Harm.STUCK])
    def test_what_is_never_answered_is_tried_again(
        self, wire: tuple[Proxy, S3Server], harmful: Proxy, harm: Harm
    ) -> None:
        """Also what is put, to a server that never says that it would take it."""
        impatient = replace(wire[1], patience_s=1.0)
        small = Transfers(whole_nbytes=1000)
        storage = impatient.storage(f"s3://{impatient.bucket}/{uuid.uuid4().hex}", transfers=small, retries=QUICK)
        kinds = ("put", "create_upload", "part", "complete", "get", "list", "delete_objects")
        for kind in kinds:
            harmful.harm(harm, kind)
        content = filled(2000)
        storage.put("small", [b"1"])
        storage.put("large", [content])
        assert ranges(storage, "large", (0, 2000)) == [content]
        assert storage.list() == ["large", "small"]
        storage.delete(["large", "small"])
        assert storage.list() == []
        assert storage.retries >= len(kinds) - 2  # the answer to what is put is empty: there is nothing to be stuck in

    def test_a_put_whose_answer_was_lost_finds_its_own_stamp(self, harmful: Proxy, storage: S3Storage) -> None:
        harmful.harm(Harm.LOST, "put", "complete", times=2)
        storage.put("a", [b"1"])
        storage.put("b", [filled(12 * MiB)])
        assert (storage.read("a"), storage.read("b")) == (b"1", filled(12 * MiB))
        assert [request.kind for request in harmful.seen].count("part") == 2

    def test_an_equal_object_of_another_is_not_taken_for_ours(
        self, harmful: Proxy, storage: S3Storage, seaweedfs: S3Server
    ) -> None:
        """Content would not tell them apart: the first try is reset, and in the meantime another writer comes."""
        harmful.harm(Harm.RESET, "put")
        other = seaweedfs.storage(f"s3://{storage._root}")

        class Parts(list):
            def __iter__(self):
                other.put("a", [b"same"])
                return super().__iter__()

        other.put("z", [b""])
        with pytest.raises(FileExistsError, match=r"'a'.*write-once"):
            storage.put("a", Parts([b"same"]))

    def test_too_many_faults_are_an_error_and_leave_nothing(self, harmful: Proxy, storage: S3Storage) -> None:
        harmful.harm(Harm.SLOW_DOWN, "part", times=1000)
        with pytest.raises(OSError, match=r"'large/x'.*slow down.*fewer ranks") as caught:
            storage.put("large/x", [filled(12 * MiB)])
        assert is_transient(caught.value)
        harmful.heal()
        assert storage.list("large") == ["first"]
        assert storage.list_uploads() == []

    @pytest.mark.parametrize("harm", [Harm.EXPIRED, Harm.DENIED])
    def test_a_refusal_is_not_tried_again_and_says_what_to_do(
        self, harmful: Proxy, storage: S3Storage, harm: Harm, seaweedfs: S3Server
    ) -> None:
        """A read-only bucket, and credentials that have expired."""
        harmful.harm(harm, "put", "create_upload", times=1000)
        for content in (b"1", filled(8 * MiB)):
            with pytest.raises(PermissionError, match=r"'a'.*check the credentials \(have they expired\?\)") as caught:
                storage.put("a", [content])
            assert seaweedfs.secret_key not in str(caught.value)
        assert storage.retries == 0
        assert storage.read("first") == b"the probe is over"

    def test_a_wrong_bucket_is_named(self, wire: tuple[Proxy, S3Server], harmful: Proxy) -> None:
        storage = wire[1].storage("s3://no-such-bucket/x", retries=QUICK)
        for content in (b"1", filled(17 * MiB)):
            with pytest.raises(FileNotFoundError, match=r"s3://no-such-bucket/x.*bucket"):
                storage.put("a", [content])
        with pytest.raises(FileNotFoundError, match=r"s3://no-such-bucket/x.*bucket"):
            storage.read("a")

    def test_an_upload_whose_beginning_was_lost_is_swept_with_its_folder(
        self, harmful: Proxy, storage: S3Storage
    ) -> None:
        harmful.harm(Harm.LOST, "create_upload")
        storage.put("step_1/attempt/x", [filled(8 * MiB)])
        orphans = storage.list_uploads()
        assert [key for key, _ in orphans] == ["step_1/attempt/x"]
        storage.delete_tree("step_1/attempt")
        assert storage.list_uploads() == []


@pytest.mark.s3
class TestServersThatDoNotRefuse:
    """Moto refuses; so what the client sends and gets is changed."""

    def storage(self, s3: S3Server, url: str, send: Callable[..., Awaitable[object]]) -> S3Storage:
        from fsspec.asyn import sync_wrapper

        class Changed(type(s3.file_system)):  # type: ignore[misc]
            async def _call_s3(self, method, *arguments, **options):
                return await send(super()._call_s3, method, options)

            call_s3 = sync_wrapper(_call_s3)

        return S3Storage(Changed(**s3.options, skip_instance_cache=True), url, transfers=IN_PARTS, retries=QUICK)

    @pytest.mark.parametrize("answer", ["ignores", "knows no such header"])
    @pytest.mark.parametrize("content", [b"1", filled(8 * MiB)], ids=["small", "large"])
    def test_the_key_is_looked_at_and_the_stamp_read_back(
        self, s3: S3Server, s3_url: str, answer: str, content: bytes
    ) -> None:
        class UnknownHeaderError(Exception):
            response: ClassVar = {"Error": {"Code": "NotImplemented"}}

        async def send(real: Callable[..., Awaitable[object]], method: str, options: dict) -> object:
            if options.pop("IfNoneMatch", None) and answer != "ignores":
                raise UnknownHeaderError
            result = await real(method, **options)
            if options.get("Key", "").endswith("raced") and method in ("put_object", "complete_multipart_upload"):
                await real("put_object", Bucket=options["Bucket"], Key=options["Key"], Body=b"the other was later")
            return result

        storage = self.storage(s3, s3_url, send)
        storage.put("a", [content])
        with pytest.raises(FileExistsError, match=r"'a'.*write-once"):
            storage.put("a", [b"2"])
        upload = storage.begin_upload("a")
        part = storage.put_parts("a", upload, [b"2"], numbers=range(1, 2))
        with pytest.raises(FileExistsError, match=r"'a'.*write-once"):
            storage.finish_upload("a", upload, part)
        storage.abort_upload("a", upload)
        assert storage.read("a") == content
        with pytest.raises(FileExistsError, match=r"'raced'.*another writer"):
            storage.put("raced", [content])
        assert storage.list() == ["a", "raced"]
        assert storage.list_uploads() == []


@pytest.mark.s3
def test_what_is_replaced_between_look_and_replacement_stays(
    any_s3: S3Server, place: Callable[[S3Server], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = any_s3.storage(place(any_s3), retries=QUICK)
    storage.put("a", [b"1"])
    put_over = requests.put_over

    def late(fs: Any, path: str, content: bytes, *, tag: str) -> None:
        storage.replace("a", b"of another")
        put_over(fs, path, content, tag=tag)

    monkeypatch.setattr(requests, "put_over", late)
    with pytest.raises(FileExistsError, match=r"'a'.*another writer"):
        storage.swap("a", b"1", b"2")
    assert storage.read("a") == b"of another"


@pytest.mark.s3
def test_a_replacement_whose_answer_was_lost_recognises_itself(
    any_s3: S3Server, place: Callable[[S3Server], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = any_s3.storage(place(any_s3), retries=QUICK)
    storage.put("a", [b"1"])
    put_over, tries = requests.put_over, list[str]()

    def deaf(fs: Any, path: str, content: bytes, *, tag: str) -> None:
        put_over(fs, path, content, tag=tag)
        tries.append(tag)
        raise ConnectionResetError("the answer was lost")

    monkeypatch.setattr(requests, "put_over", lambda *a, **k: (put_over if tries else deaf)(*a, **k))
    storage.swap("a", b"1", b"2")
    assert storage.read("a") == b"2"
    assert len(tries) == 1


@pytest.mark.s3
def test_a_server_that_knows_tags_only_without_their_quotes(
    s3: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ceph 16.2 does."""
    send, seen = requests._send, list[str]()

    def picky(fs: Any, method: str, path: str, content: bytes, **options: Any) -> Any:
        if "IfMatch" in options:
            seen.append(options["IfMatch"])
        if str(options.get("IfMatch", "")).startswith('"'):
            raise FileExistsError(path)
        return send(fs, method, path, content, **options)

    storage = s3.storage(s3_url, retries=QUICK)
    storage.put("a", [b"1"])
    monkeypatch.setattr(requests, "_send", picky)
    storage.swap("a", b"1", b"2")
    assert storage.read("a") == b"2"
    assert seen == [f'"{seen[1]}"', seen[1]], "it was conditional all the same"
    with pytest.raises(FileExistsError, match="another writer"):
        storage.swap("a", b"1", b"3")


SHARING = ["memory", "moto", "seaweedfs"]


@pytest.mark.s3
@pytest.mark.parametrize("kind", SHARING)
class TestSharedPuts:
    """Several writers of one object, on everything that can do that."""

    @pytest.fixture
    def storage(self, kind: str, request: pytest.FixtureRequest, place: Callable[[S3Server], str]) -> SharedPuts:
        if kind == "memory":
            return MemoryObjects("shared")
        server = request.getfixturevalue("s3" if kind == "moto" else kind)
        return server.storage(place(server), transfers=IN_PARTS, retries=QUICK)

    @pytest.fixture(autouse=True)
    def servers(self, s3: S3Server, seaweedfs: S3Server) -> None:
        """Started before the leaks are counted."""

    def test_stretches_in_any_order_with_gaps(self, storage: SharedPuts) -> None:
        content = memoryview(filled(23 * MiB))
        upload = storage.begin_upload("a/b")
        last = storage.put_parts("a/b", upload, [content[17 * MiB :]], numbers=range(5001, 10_001))
        first = storage.put_parts("a/b", upload, [content[: 6 * MiB], content[6 * MiB : 17 * MiB]], numbers=range(1, 3))
        assert storage.list("a") == []
        assert storage.list_uploads() == storage.list_uploads("a")
        assert [key for key, _ in storage.list_uploads("a")] == ["a/b"]
        storage.finish_upload("a/b", upload, [*last, *first])
        assert storage.read("a/b") == content
        assert storage.list_uploads() == []
        assert sum(part.nbytes for part in (*first, *last)) == len(content)
        with pytest.raises(FileExistsError):
            storage.put("a/b", [b"1"])

    def test_a_finished_upload_is_write_once(self, storage: SharedPuts) -> None:
        upload = storage.begin_upload("a")
        parts = storage.put_parts("a", upload, [b"late"], numbers=range(1, 2))
        storage.put("a", [b"early"])
        with pytest.raises(FileExistsError, match="'a'"):
            storage.finish_upload("a", upload, parts)
        storage.abort_upload("a", upload)
        assert storage.read("a") == b"early"
        assert storage.list_uploads() == []

    def test_only_what_is_known_is_replaced(self, storage: SharedPuts) -> None:
        storage.put("a", [b"1"])
        storage.swap("a", b"1", b"2")
        with pytest.raises(FileExistsError, match=r"'a'.*another writer has replaced it"):
            storage.swap("a", b"1", b"3")
        assert storage.read("a") == b"2"
        with pytest.raises(FileNotFoundError, match="'b'"):
            storage.swap("b", b"1", b"2")
        assert storage.list() == ["a"]

    def test_a_late_writer_of_an_aborted_upload_harms_nothing(self, storage: SharedPuts) -> None:
        upload = storage.begin_upload("d/a")
        other = storage.begin_upload("e/a")
        parts = storage.put_parts("d/a", upload, [b"1"], numbers=range(1, 2))
        storage.delete_tree("d")
        assert [key for key, _ in storage.list_uploads()] == ["e/a"]
        storage.put("d/a", [b"the next attempt"])
        for late in (
            lambda: storage.put_parts("d/a", upload, [b"2"], numbers=range(2, 3)),
            lambda: storage.finish_upload("d/a", upload, parts),
        ):
            with pytest.raises(OSError, match="'d/a'"):
                late()
        storage.abort_upload("d/a", upload)
        storage.abort_upload("e/a", other)
        assert storage.read("d/a") == b"the next attempt"


def test_pieces_are_views_where_they_can_be() -> None:
    content = bytearray(filled(100))
    buffers = [memoryview(content)[:50], memoryview(content)[50:53], memoryview(content)[53:]]
    pieces = list(cut(buffers, lambda _: 20))
    assert b"".join(pieces) == content
    assert [len(piece) for piece in pieces] == [20] * 5
    assert [piece.obj is content for piece in pieces] == [True, True, False, True, True]
    assert [bytes(piece) for piece in cut([], lambda _: 5)] == [b""]


@pytest.mark.parametrize("total", [0, 1, 5 * MiB, 9 * MiB, 10 * MiB + 1, 24 * MiB, 30 * MiB + 7, 5000 * MiB])
@pytest.mark.parametrize("room", [1, 2, 100, 10_000])
def test_of_a_known_size_no_part_is_too_small_and_the_numbers_are_enough(total: int, room: int) -> None:
    size_of, left = sizes(total, part_nbytes=8 * MiB, room=room), total
    parts: list[int] = []
    while left:
        parts.append(min(size_of(len(parts)), left))
        left -= parts[-1]
    assert len(parts) <= room
    assert len(parts) <= 1 or all(part >= 5 * MiB for part in parts)
    assert len(parts) == room or all(part <= 10 * MiB for part in parts)


def test_of_an_unknown_size_the_parts_grow() -> None:
    assert nbytes_of([bytes(3), b"4"]) == 4
    assert nbytes_of(iter([b"4"])) is None
    size_of = sizes(None, part_nbytes=8 * MiB, room=10_000)
    assert [size_of(number) for number in (0, 1999, 2000, 9999)] == [8 * MiB, 8 * MiB, 16 * MiB, 128 * MiB]
    assert sum(size_of(number) for number in range(10_000)) > 480 << 30
