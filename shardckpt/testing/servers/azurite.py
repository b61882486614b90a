"""Azure Blob Storage on this machine, for tests: Azurite, the emulator of its makers, from npm."""

from __future__ import annotations

import base64
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shardckpt.testing.servers.process import free_ports, process, started, status_of

_ACCOUNT = "devstoreaccount1"
_MAIN = "node_modules/azurite/dist/src/blob/main.js"


@dataclass(frozen=True)
class BlobServer:
    """A server that is running, with one account and no container, and what `open_storage` needs to reach it."""

    endpoint: str
    """URL, of the loopback interface, with the account."""
    account_key: str

    @property
    def options(self) -> Mapping[str, str]:
        """`storage_options`."""
        said = {
            "DefaultEndpointsProtocol": "http",
            "AccountName": _ACCOUNT,
            "AccountKey": self.account_key,
            "BlobEndpoint": self.endpoint,
        }
        return {"connection_string": ";".join(f"{name}={value}" for name, value in said.items())}


def program() -> tuple[str, Path] | None:
    """node, and the script that it is to run: of the environment of this Python, where `launch/setup.sh` puts it."""
    node, main = shutil.which("node"), Path(sys.prefix) / "azurite" / _MAIN
    return (node, main) if node and main.is_file() else None


@contextmanager
def running() -> Iterator[BlobServer]:
    """Serve on a free port of the loopback interface until the block ends; it keeps all in memory.

    Called in the main thread of one process, as `process` says. `FileNotFoundError` if node or Azurite is not
    installed, `ServerError` if it does not start.
    """
    found = program()
    if found is None:
        raise FileNotFoundError(
            f"there is no Azurite here: install node and npm, then npm install --prefix {sys.prefix}/azurite azurite"
        )
    with started(partial(_started, *found)) as server:
        yield server


@contextmanager
def _started(node: str, main: Path, folder: Path) -> Iterator[BlobServer]:
    (port,) = free_ports(1)
    key = base64.b64encode(secrets.token_bytes(64)).decode()
    command = [node, str(main), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent"]
    # The Python package asks for a newer API than the emulator knows; what is used here is in both.
    command += ["--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck"]
    accounts = {"AZURITE_ACCOUNTS": f"{_ACCOUNT}:{key}"}
    with process(command, folder, name="Azurite", environment=accounts) as server:
        server.wait_for(lambda: status_of(port, "/") is not None)
        yield BlobServer(f"http://127.0.0.1:{port}/{_ACCOUNT}", key)
