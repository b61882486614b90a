"""A Ceph object gateway on this machine, from Debian's packages ceph-common, ceph-mon, ceph-osd and radosgw.

One monitor, one object store in memory, one gateway; about 10 s until it answers. For tests of what this server does,
by hand and in slow jobs: it refuses to create by a put what is there, but not by the end of an upload in parts (16.2).
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from shardckpt.testing.servers.process import Server, ServerError, free_ports, process, started, status_of
from shardckpt.testing.servers.seaweed import ObjectServer

_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_STEP_S = 60.0
_ENVIRONMENT = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}

_CONFIGURATION = """\
[global]
fsid = {cluster}
mon host = v2:127.0.0.1:{monitor}
public network = 127.0.0.0/8
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
mon allow pool size one = true
mon max pg per osd = 2000
ms bind msgr1 = false
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
mon data = {folder}/mon
osd data = {folder}/osd
keyring = {folder}/keyring
rgw frontends = beast endpoint=127.0.0.1:{gateway}
"""


def is_installed() -> bool:
    """Whether all its programs are there."""
    return all(map(shutil.which, _PROGRAMS))


@contextmanager
def running() -> Iterator[ObjectServer]:
    """Serve on free ports of the loopback interface until the block ends; the bucket is still to be made.

    Called in the main thread of one process, as for `shardckpt.testing.servers.seaweed.running`. `FileNotFoundError`
    if it is not installed, `ServerError` if it does not start.
    """
    if not is_installed():
        raise FileNotFoundError("there is no Ceph here: apt install ceph-common ceph-mon ceph-osd radosgw")
    with started(_started) as server:
        yield server


@contextmanager
def _started(folder: Path) -> Iterator[ObjectServer]:
    monitor, gateway = free_ports(2)
    cluster, disk = str(uuid.uuid4()), str(uuid.uuid4())
    keys = f"key{secrets.token_hex(8)}", secrets.token_hex(20)
    text = _CONFIGURATION.format(cluster=cluster, monitor=monitor, gateway=gateway, folder=folder)
    (folder / "ceph.conf").write_text(text)
    run = partial(_run, folder)
    for number, name in enumerate(("mon.", "osd.0", "client.admin", "client.rgw")):
        new = ("--create-keyring",) if number == 0 else ()
        may = [word for kind in ("mon", "osd") for word in ("--cap", kind, "allow *")]
        run("ceph-authtool", *new, "keyring", "--gen-key", "-n", name, *may)
    for name in ("mon", "osd"):
        (folder / name).mkdir()
    run("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{monitor}]", "--fsid", cluster, "monmap")
    run("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
    with ExitStack() as stack:

        def serve(program: str, *options: str) -> Server:
            command = [program, "-c", str(folder / "ceph.conf"), *options, "-f"]
            log = folder / f"of-{program}"
            log.mkdir()
            serving = process(command, log, name=f"Ceph ({program})", environment=_ENVIRONMENT)
            return stack.enter_context(serving)

        serve("ceph-mon", "-i", "a")
        run("ceph", "osd", "new", disk)
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        serve("ceph-osd", "-i", "0")
        user = ("--uid", "test", "--display-name", "test", "--access-key", keys[0], "--secret-key", keys[1])
        run("radosgw-admin", "user", "create", *user)
        server = serve("radosgw", "-n", "client.rgw")
        server.wait_for(lambda: status_of(gateway, "/") is not None)
        yield ObjectServer(f"http://127.0.0.1:{gateway}", f"test-{uuid.uuid4().hex}", *keys, server.pid)


def _run(folder: Path, program: str, *options: str) -> None:
    command: Sequence[str] = [program, "-c", "ceph.conf", *options]
    try:
        done = subprocess.run(command, cwd=folder, env=_ENVIRONMENT, timeout=_STEP_S, capture_output=True, text=True)
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"{program} {options[0]} did not end within {_STEP_S:g} s") from error
    if done.returncode:
        raise ServerError(f"{program} {options[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
