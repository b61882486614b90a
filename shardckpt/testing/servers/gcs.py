"""Google Cloud Storage on this machine, for tests: the emulator of the package `gcp-storage-emulator`.

It is no more than an emulator: it takes any credentials. What else it lacks is added by `gcs_emulator`.
"""

from __future__ import annotations

import http
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from shardckpt.testing.servers.process import free_ports, process, started, status_of


@dataclass(frozen=True)
class GcsServer:
    """A server that is running, with one bucket, and what `open_storage` needs to reach it."""

    endpoint: str
    """URL, of the loopback interface."""
    bucket: str

    @property
    def options(self) -> Mapping[str, str]:
        """`storage_options`."""
        return {"endpoint_url": self.endpoint, "token": "anon", "project": "test"}


def is_installed() -> bool:
    return find_spec("gcp_storage_emulator") is not None


@contextmanager
def running(*, bucket: str = "checkpoints", conditions: bool = True) -> Iterator[GcsServer]:
    """Serve on a free port of the loopback interface until the block ends; it keeps all in memory.

    Without `conditions` it overwrites what it is told to create, as servers do that do not know that condition.
    Called in the main thread of one process, as `process` says. `FileNotFoundError` if the package is not installed,
    `ServerError` if it does not start.
    """
    if not is_installed():
        raise FileNotFoundError("there is no emulator of GCS here: pip install 'shardckpt[testing]'")
    with started(partial(_started, bucket, conditions)) as server:
        yield server


@contextmanager
def _started(bucket: str, conditions: bool, folder: Path) -> Iterator[GcsServer]:
    (port,) = free_ports(1)
    command = [sys.executable, str(Path(__file__).with_name("gcs_emulator.py")), *([] if conditions else ["--plain"])]
    command += ["start", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--in-memory", "--quiet", "--default-bucket", bucket]
    with process(command, folder, name="gcp-storage-emulator", environment={}) as server:
        server.wait_for(lambda: status_of(port, f"/storage/v1/b/{bucket}") == http.HTTPStatus.OK)
        yield GcsServer(f"http://127.0.0.1:{port}", bucket)
