"""Two nodes on this machine: network namespaces, joined by a cable that can be cut. The file system is shared."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shardckpt.testing.gangs import run_threads

T = TypeVar("T")

_LINK = "cable"
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET; Python 3.12 names it
_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
_NEW_FOLDER = 0x00000200  # CLONE_FS: a thread may enter mounts only if it shares its current folder with nobody
_READ_ONLY, _REMOUNT, _BIND, _ALL_BELOW, _PRIVATE = 0x1, 0x20, 0x1000, 0x4000, 0x40000  # mount(2)
_PROGRAMS = ("ip", "tc", "unshare", "nsenter")
_KINDS = ("net", "mount", "uts")
_FILES = {"hosts": "127.0.0.1 localhost\n::1 localhost\n", "nsswitch.conf": "hosts: files\n"}
"""In /etc, of each node. Without the second a name that is looked up costs ten seconds of waiting for a name server."""


class NoNodesError(OSError):
    """This machine does not let us make namespaces, or has not the programs for it."""


@dataclass(frozen=True)
class Nodes:
    """The namespaces live as long as these processes, and go with them."""

    pids: tuple[int, int]
    link: str = _LINK
    """The name of the interface, on both."""
    ipv6: bool = False
    """Whether there is no other internet protocol between them."""

    def address(self, node: int) -> str:
        return f"2001:db8::{node + 1}" if self.ipv6 else f"192.0.2.{node + 1}"

    def name(self, node: int) -> str:
        """Of the machine, by which both know its address."""
        return f"node{node}"

    def at(self, node: int) -> list[str]:
        """What a command begins with that is to run there."""
        namespaces = [f"--{kind}" for kind in _KINDS]
        return ["nsenter", *namespaces, "--target", str(self.pids[node]), "env", f"GLOO_SOCKET_IFNAME={self.link}"]

    def slow_down(self, kbit: int) -> None:
        """So many thousand bits a second from now on, in both directions."""
        for pid in self.pids:
            limit = ["rate", f"{kbit}kbit", "burst", "16k", "latency", "500ms"]
            _inside(pid, "tc", "qdisc", "replace", "dev", _LINK, "root", "tbf", *limit)

    def cut(self) -> None:
        """The second node is off the net from now on: what is sent to it gets no answer, not even a refusal."""
        _inside(self.pids[1], "ip", "link", "set", _LINK, "down")

    def mend(self) -> None:
        _inside(self.pids[1], "ip", "link", "set", _LINK, "up")
        self.give_address(1)

    def give_address(self, node: int) -> None:
        """Again after a cut: Linux takes those of IPv6 away."""
        bits, at_once = ("64", ["nodad"]) if self.ipv6 else ("24", [])
        _inside(self.pids[node], "ip", "address", "replace", f"{self.address(node)}/{bits}", "dev", _LINK, *at_once)

    @contextmanager
    def on(self, node: int) -> Iterator[None]:
        """The calling thread, and those that it starts in this block, are on that node."""
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/proc/{self.pids[node]}/ns/net", os.O_RDONLY)
        try:
            _enter(there)
            yield
        finally:
            _enter(here)
            os.close(here)
            os.close(there)


@contextmanager
def two_nodes(*, ipv6: bool = False) -> Iterator[Nodes]:
    """Until the block ends. `NoNodesError` if this machine has no such thing."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        raise NoNodesError(f"not installed: {', '.join(missing)} (iproute2, util-linux)")
    with ExitStack() as stack:
        etc = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardckpt-nodes-")))
        one, other = (stack.enter_context(_namespace(etc, node)) for node in range(2))
        nodes = Nodes((one, other), ipv6=ipv6)
        hosts = "".join(f"{nodes.address(node)} {nodes.name(node)}\n" for node in range(2))
        (etc / "hosts").write_text(_FILES["hosts"] + hosts)
        peer = ["peer", "name", _LINK, "netns", str(other)]
        _inside(one, "ip", "link", "add", _LINK, "type", "veth", *peer)
        for node, pid in enumerate(nodes.pids):
            nodes.give_address(node)
            for interface in ("lo", _LINK):
                _inside(pid, "ip", "link", "set", interface, "up")
        yield nodes


def with_own_mounts(
    act: Callable[[], T],
    *,
    fresh: str | os.PathLike[str] | None = None,
    read_only: str | os.PathLike[str] | None = None,
) -> T:
    """What `act` gives in a thread which, like those that it starts, sees mounts of its own: a disk of this node's at
    `fresh`, and what lies at `read_only` as it is, but not to be written."""

    def enter_and_act() -> T:
        _call("unshare", _NEW_FOLDER | _NEW_MOUNTS)
        _mount("none", "/", None, _ALL_BELOW | _PRIVATE)
        if fresh is not None:
            _mount("node", fresh, "tmpfs", 0)
        if read_only is not None:
            _mount(read_only, read_only, None, _BIND)
            _mount("none", read_only, None, _BIND | _REMOUNT | _READ_ONLY)
        return act()

    (outcome,) = run_threads(1, lambda _: enter_and_act())
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _mount(what: str | os.PathLike[str], where: str | os.PathLike[str], kind: str | None, flags: int) -> None:
    _call("mount", os.fsencode(what), os.fsencode(where), kind and kind.encode(), ctypes.c_ulong(flags), None)


@contextmanager
def _namespace(etc: Path, node: int) -> Iterator[int]:
    """The process that holds them: it ends when its input does, so with us at the latest."""
    for name, content in _FILES.items():
        (etc / name).write_text(content)
    mounts = "".join(f"[ -e /etc/{name} ] && mount --bind {etc / name} /etc/{name}; " for name in _FILES)
    script = f"echo node{node} >/proc/sys/kernel/hostname; {mounts}echo ready; exec cat"
    command = ["unshare", *(f"--{kind}" for kind in _KINDS), "sh", "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        try:
            if holder.stdout.readline().strip() != "ready":
                raise NoNodesError(holder.stderr.read().strip())
            yield holder.pid
        finally:
            holder.stdin.close()
            holder.wait()


def _inside(pid: int, *command: str) -> None:
    done = subprocess.run(["nsenter", "--net", "--target", str(pid), *command], capture_output=True, text=True)
    if done.returncode:
        raise NoNodesError(f"{' '.join(command)}: {done.stderr.strip()}")


def _enter(namespace: int) -> None:
    _call("setns", namespace, _NEW_NETWORK)


def _call(name: str, *arguments: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
