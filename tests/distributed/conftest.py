from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage import s3server
from tests.storage.s3server import S3Server


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    """A real object store, in a process of its own."""
    s3server.need_seaweedfs()
    with s3server.seaweedfs() as running:
        yield running
