"""`client="direct"`: chosen by `storage_options`; nothing is copied, shown, or taken for an answer."""

from __future__ import annotations

import errno
import io
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.storage import RetryPolicy, S3Storage, Transfers, open_storage
from shardckpt.storage.objects import direct, requests
from shardckpt.testing.storage_suite import filled, ranges
from tests.storage.s3server import S3Server
from tests.storage.test_secrets import shown_by

pytestmark = pytest.mark.s3

MiB = 1 << 20
IN_PARTS = Transfers(whole_nbytes=6 * MiB, part_nbytes=5 * MiB, request_nbytes=1 * MiB, wave_nbytes=20 * MiB)
ONCE = RetryPolicy(tries=1)


def opened(server: S3Server, url: str, **options: Any) -> S3Storage:
    """As users open it."""
    storage = open_storage(url, storage_options={**server.options, "client": "direct", **options})
    assert isinstance(storage, S3Storage)
    return storage


@pytest.fixture
def url(seaweedfs: S3Server, place: Callable[[S3Server], str]) -> str:
    return place(seaweedfs)


@pytest.fixture
def storage(seaweedfs: S3Server, url: str) -> Iterator[S3Storage]:
    storage = opened(seaweedfs, url)
    yield storage
    storage.close()


@pytest.fixture
def no_s3fs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts and ranges must not go that way."""

    def never(*_: object) -> None:
        raise AssertionError("through s3fs")

    monkeypatch.setattr(requests, "put_part", never)
    monkeypatch.setattr(requests, "get_range", never)


@pytest.mark.usefixtures("no_s3fs")
def test_a_checkpoint_goes_there_and_comes_back(seaweedfs: S3Server, url: str) -> None:
    options = {**seaweedfs.options, "client": "direct"}
    weights = torch.arange(5 * MiB, dtype=torch.float32)
    with sc.CheckpointManager(url, storage_options=options) as checkpoints:
        checkpoints.save(1, {"model": {"w": weights}}).result()
        state = {"model": {"w": torch.zeros_like(weights)}}
        checkpoints.load(1, state)
    assert torch.equal(state["model"]["w"], weights)
    assert sc.verify(url, storage_options=options).ok


def test_parts_go_out_of_the_callers_memory(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.httpsession import URLLib3Session

    content, sent, real = bytearray(filled(17 * MiB)), list[Any](), URLLib3Session.send
    monkeypatch.setattr(URLLib3Session, "send", lambda self, request: sent.append(request.body) or real(self, request))
    storage.put("a", [memoryview(content)])
    assert len(sent) == 3
    assert all(body.obj is content for body in sent)
    assert ranges(storage, "a", (0, 17 * MiB), (16 * MiB, MiB)) == [content, content[16 * MiB :]]


def test_ranges_come_into_the_callers_memory(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """urllib3 would make an object of each piece, and copy it from there."""
    from urllib3.response import HTTPResponse

    content = filled(9 * MiB)
    storage.put("a", [content])
    for name in ("read", "readinto", "stream"):
        monkeypatch.setattr(HTTPResponse, name, lambda *_: pytest.fail("through urllib3's own buffers"))
    assert ranges(storage, "a", (1, 9 * MiB - 1)) == [content[1:]]


def test_connections_are_used_again(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    made, real = list[Any](), socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: made.append(address) or real(self, address))
    storage.put("a", [filled(40 * MiB)])
    for _ in range(5):
        ranges(storage, "a", (0, 40 * MiB))
    assert 0 < len(made) <= storage._transfers.concurrency


def test_a_child_made_by_fork_connects_anew(storage: S3Storage) -> None:
    content = filled(17 * MiB)
    storage.put("parent", [content])
    assert ranges(storage, "parent", (1, MiB)) == [content[1 : MiB + 1]]
    child = os.fork()
    if child == 0:
        try:
            good = ranges(storage, "parent", (1, MiB)) == [content[1 : MiB + 1]]
            good = good and storage.put("child", [content]) == len(content)
            os._exit(0 if good and storage._direct and storage._direct._live[0] == os.getpid() else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ranges(storage, "child", (0, 17 * MiB)) == [content]


def test_after_close_it_connects_and_signs_anew(storage: S3Storage) -> None:
    storage.put("a", [filled(17 * MiB)])
    before = ranges(storage, "a", (5, 5))
    storage.close()
    assert storage._direct is not None
    assert (storage._direct._live, storage._direct._signed) == (None, {})
    assert ranges(storage, "a", (5, 5)) == before


def test_an_old_signature_is_not_used_again(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put("a", [filled(17 * MiB)])
    signed, real = list[str](), direct._sign
    monkeypatch.setattr(direct, "_sign", lambda *all_: signed.append(real(*all_)) or signed[-1])
    for _ in range(3):
        ranges(storage, "a", (5, 5))
    assert len(signed) == 1
    monkeypatch.setattr(direct, "_FRESH_S", -1.0)
    ranges(storage, "a", (5, 5))
    assert len(signed) == 2
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in signed[0]


@pytest.mark.parametrize("work", ["put", "read"])
def test_no_signature_is_shown(storage: S3Storage, seaweedfs: S3Server, work: str) -> None:
    """Where nobody listens, and where the server refuses."""
    fs = storage._client()
    storage.put("a", [filled(17 * MiB)])
    wrong = opened(seaweedfs, storage.url, secret="not-the-secret")
    wrong._retrier = type(wrong._retrier)(ONCE)
    upload = storage.begin_upload("b")
    signed = direct._sign(fs, storage._path("a"), "get_object", {})
    away = signed.replace(seaweedfs.endpoint, "http://127.0.0.1:9")
    with pytest.raises(ConnectionError) as lost:
        direct.Direct()._send(fs, "", "GET", away, {}, None)
    attempt = {
        "put": lambda: wrong.put_parts("b", upload, [b"1"], numbers=range(1, 2)),
        "read": lambda: ranges(wrong, "a", (0, 5)),
    }[work]
    with pytest.raises(PermissionError, match="check the credentials") as refused:
        attempt()
    storage.abort_upload("b", upload)
    wrong.close()
    for shown in (shown_by(lost.value), shown_by(refused.value)):
        assert "X-Amz" not in shown
        assert signed.partition("?")[2] not in shown
        assert "not-the-secret" not in shown


def test_what_cannot_be_said_is_refused(seaweedfs: S3Server, url: str) -> None:
    """A key of one's own for encryption goes in headers that are part of the signature."""
    key = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "CaNaRy" * 5 + "xx"}
    storage = opened(seaweedfs, url, s3_additional_kwargs=key)
    with pytest.raises(
        OSError, match=r"x-amz-server-side-encryption-customer-key.*leave client='direct' out"
    ) as caught:
        ranges(storage, "a", (0, 5))
    assert caught.value.errno == errno.ENOTSUP
    assert "CaNaRy" not in shown_by(caught.value)


class Answer:
    """Instead of a server's. What it tells beside the content, a page of a gateway does not."""

    def __init__(self, status: int, content: bytes = b"<html>sign in</html>", **headers: str) -> None:
        self.status_code, self.content, self.raw = status, content, io.BytesIO(content)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.mark.parametrize("status", [200, 206, 302, 503])
def test_a_page_is_no_answer(storage: S3Storage, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    storage.put("a", [b"12345"])
    storage._retrier = type(storage._retrier)(ONCE)
    upload = storage.begin_upload("b")
    monkeypatch.setattr(direct.Direct, "_send", lambda *_: Answer(status))
    with pytest.raises(OSError, match=r"'b'"):
        storage.put_parts("b", upload, [b"1"], numbers=range(1, 2))
    with pytest.raises(OSError, match=r"'a'"):
        ranges(storage, "a", (0, 5))
    storage.abort_upload("b", upload)


def test_an_answer_that_ends_early_is_no_short_object(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server said is to come tells them apart: one is asked for again, the other is damage."""
    storage._retrier = type(storage._retrier)(ONCE)
    answers = [
        Answer(206, b"123", ETag="1", Content_Range="bytes 7-11/100", Content_Length="5"),
        Answer(206, b"123", ETag="1", Content_Range="bytes 7-9/10", Content_Length="3"),
        Answer(200, b"12345", ETag="1", Content_Length="5"),
    ]
    monkeypatch.setattr(direct.Direct, "_send", lambda *_: answers.pop(0))
    with pytest.raises(ConnectionError, match=r"'a'"):
        ranges(storage, "a", (7, 5))
    with pytest.raises(EOFError, match=r"'a'.*truncated"):
        ranges(storage, "a", (7, 5))
    with pytest.raises(OSError, match=r"'a'.*whole objects"):
        ranges(storage, "a", (7, 5))


def test_who_else_is_there() -> None:
    url = f"s3://bucket/{uuid.uuid4().hex}"
    with pytest.raises(ValueError, match="`client` must be 's3fs' or 'direct'"):
        open_storage(url, storage_options={"client": "obstore"})
    plain = open_storage(url, storage_options={"client": "s3fs", "key": "k", "secret": "s"})
    assert isinstance(plain, S3Storage)
    assert plain._direct is None
