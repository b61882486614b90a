"""An S3 server in this process, for unit tests: moto."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"


@dataclass(frozen=True)
class S3Server:
    """Where it is, and what to give `open_storage` to reach it."""

    endpoint: str
    bucket: str = field(default_factory=lambda: f"test-{uuid.uuid4().hex}")
    """Its own: what one server of moto holds, all later ones in the same process hold, too."""

    @property
    def options(self) -> Mapping[str, Any]:
        return {"key": ACCESS_KEY, "secret": SECRET_KEY, "endpoint_url": self.endpoint}

    def make_bucket(self) -> None:
        self.file_system.mkdir(self.bucket)

    @cached_property
    def file_system(self) -> Any:
        """An fsspec file system, made as `open_storage` makes them; shared by tests, for making one takes 0.2 s."""
        import s3fs

        return s3fs.S3FileSystem(**self.options, use_listings_cache=False, skip_instance_cache=True)


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
