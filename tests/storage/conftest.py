from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.storage import s3server


@pytest.fixture(scope="session")
def s3() -> Iterator[s3server.S3Server]:
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'shardckpt[s3]'")
    pytest.importorskip("moto", reason="moto is not installed: pip install 'moto[server]'")
    with s3server.running() as server:
        server.make_bucket()
        yield server


@pytest.fixture
def s3_url(s3: s3server.S3Server) -> Iterator[str]:
    """The URL of a place of this test's own. Emptied afterwards: moto keeps large objects in open temporary files."""
    url = f"s3://{s3.bucket}/{uuid.uuid4().hex}"
    yield url
    if left := s3.file_system.find(url):
        s3.file_system.rm(left)
