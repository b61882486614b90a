from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage import s3server
from tests.storage.s3server import S3Server


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """An object store in this process."""
    with s3server.running() as running:
        running.make_bucket()
        yield running
