from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.storage import s3server


@pytest.fixture(scope="session")
def s3() -> Iterator[s3server.S3Server]:
    """Moto, in this process."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'shardckpt[s3]'")
    pytest.importorskip("moto", reason="moto is not installed: pip install 'moto[server]'")
    with s3server.running() as server:
        server.make_bucket()
        yield server


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[s3server.S3Server]:
    """A real object store, in a process of its own."""
    s3server.need_seaweedfs()
    with s3server.seaweedfs() as server:
        yield server


@pytest.fixture(scope="session")
def ceph() -> Iterator[s3server.S3Server]:
    """Only where it is asked for: it takes 15 s to start."""
    with s3server.ceph_gateway() as server:
        server.make_bucket()
        yield server


@pytest.fixture
def place() -> Iterator[Callable[[s3server.S3Server], str]]:
    """Makes URLs of places of this test's own. Emptied afterwards: moto keeps large objects in open temporary files."""
    made: list[tuple[s3server.S3Server, str]] = []

    def make(server: s3server.S3Server) -> str:
        made.append((server, f"s3://{server.bucket}/{uuid.uuid4().hex}"))
        return made[-1][1]

    yield make
    for server, url in made:
        if left := server.file_system.find(url):
            server.file_system.rm(left)


@pytest.fixture
def s3_url(s3: s3server.S3Server, place: Callable[[s3server.S3Server], str]) -> str:
    """The URL of a place of this test's own, on moto."""
    return place(s3)


@pytest.fixture(scope="session", params=["moto", "seaweedfs", *s3server.more()])
def any_s3(request: pytest.FixtureRequest) -> s3server.S3Server:
    """Each server that there is."""
    server = s3server.given() if request.param == "given" else None
    return server or request.getfixturevalue("s3" if request.param == "moto" else request.param)
