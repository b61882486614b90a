"""S3 by https: what comes is what was sent, whoever sends it, and only to a server that is trusted."""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.storage import S3Storage, open_storage
from shardckpt.storage.objects import requests
from shardckpt.testing.servers import seaweed
from shardckpt.testing.servers.certificate import Certificate, new_certificate
from shardckpt.testing.storage_suite import filled, ranges
from tests.storage import proxy
from tests.storage.proxy import Harm
from tests.storage.s3server import S3Server, need_seaweedfs
from tests.storage.test_s3 import IN_PARTS
from tests.storage.test_secrets import shown_by

pytestmark = pytest.mark.s3

MiB = 1 << 20
CLIENTS = pytest.mark.parametrize("client", ["direct", "s3fs"])


@pytest.fixture(scope="module")
def server() -> Iterator[seaweed.ObjectServer]:
    need_seaweedfs()
    with seaweed.running(tls=True) as server:
        yield server


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return new_certificate(tmp_path_factory.mktemp("foreign"))


def place(server: seaweed.ObjectServer) -> str:
    return f"{server.url}/{uuid.uuid4().hex}"


def opened(server: seaweed.ObjectServer, **options: Any) -> S3Storage:
    storage = open_storage(place(server), storage_options={**server.options, **options})
    assert isinstance(storage, S3Storage)
    return storage


@CLIENTS
def test_a_checkpoint_goes_there_and_comes_back(
    server: seaweed.ObjectServer, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if client == "direct":
        for name in ("put_part", "get_range"):
            monkeypatch.setattr(requests, name, lambda *_: pytest.fail("through s3fs"))
    url, options = place(server), {**server.options, "client": client}
    assert str(options["endpoint_url"]).startswith("https://")
    weights = torch.arange(5 * MiB, dtype=torch.float32)
    with sc.CheckpointManager(url, storage_options=options) as checkpoints:
        checkpoints.save(1, {"model": {"w": weights}}).result()
        state = {"model": {"w": torch.zeros_like(weights)}}
        checkpoints.load(1, state)
        assert torch.equal(state["model"]["w"], weights)
    assert sc.verify(url, storage_options=options).ok


def test_the_environment_says_whom_to_trust(server: seaweed.ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    content, storage = filled(17 * MiB), open_storage(place(server), storage_options={"client": "direct"})
    storage.put("a", [content])
    assert ranges(storage, "a", (0, 17 * MiB)) == [content]
    storage.close()


def test_connections_are_used_again(server: seaweed.ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """To agree on keys costs more than a small range."""
    storage, made, real = opened(server, client="direct"), list[object](), ssl.SSLSocket.do_handshake
    storage.put("a", [filled(40 * MiB)])
    monkeypatch.setattr(ssl.SSLSocket, "do_handshake", lambda self, *rest: made.append(self) or real(self, *rest))
    for _ in range(5):
        ranges(storage, "a", (0, 40 * MiB))
    assert len(made) <= storage._transfers.concurrency - 4
    storage.close()


@CLIENTS
def test_a_server_that_is_not_trusted_gets_nothing(
    server: seaweed.ObjectServer, client: str, foreign: Certificate
) -> None:
    """It is told at once, not after a minute of tries, and with what to do."""
    trusted = opened(server, client=client)
    trusted.put("a", [b"12345"])
    other = {"client_kwargs": {"verify": str(foreign.certificate)}}
    storage = open_storage(trusted.url, storage_options={**server.options, "client": client, **other})
    for call in (lambda: ranges(storage, "a", (0, 5)), lambda: storage.put("b", [b"1"])):
        with pytest.raises(
            OSError, match=r"certificate of the server is not trusted.*'verify'.*AWS_CA_BUNDLE"
        ) as caught:
            call()
        assert server.secret_key not in shown_by(caught.value)
        assert "X-Amz-Signature" not in shown_by(caught.value)
    assert storage.retries == 0  # type: ignore[attr-defined]
    assert trusted.list() == ["a"]
    storage.close()
    trusted.close()


@pytest.mark.leaks(threads=("Thread-",), why="the proxy's, one for each connection that a client keeps")
@pytest.mark.parametrize("harm", [Harm.TRUNCATED, Harm.RESET, Harm.LOST])
def test_what_breaks_off_is_asked_for_again(seaweedfs: S3Server, foreign: Certificate, harm: Harm) -> None:
    """Within TLS a connection breaks in other ways."""
    with proxy.before(seaweedfs.endpoint, certificate=foreign) as harmful:
        options = {"endpoint_url": harmful.endpoint, "client_kwargs": {"verify": str(foreign.certificate)}}
        # Else s3fs, which asks and begins, sends by https in chunks, which this proxy does not take.
        options["config_kwargs"] = {"request_checksum_calculation": "when_required"}
        url, options = f"s3://{seaweedfs.bucket}/{uuid.uuid4().hex}", {**seaweedfs.options, **options}
        storage = open_storage(url, storage_options={**options, "client": "direct"})
        assert isinstance(storage, S3Storage)
        storage._transfers = IN_PARTS
        content = filled(7 * MiB)
        storage.put("first", [content])
        harmful.harm(harm, "part", times=2)
        harmful.harm(harm, "get", times=2)
        storage.put("a", [content])
        assert ranges(storage, "first", (1, 6 * MiB)) == [content[1 : 6 * MiB + 1]]
        assert ranges(storage, "a", (0, 7 * MiB)) == [content]
        assert storage.retries == (2 if harm is Harm.TRUNCATED else 4)  # the answer to a part is empty
        storage.close()
