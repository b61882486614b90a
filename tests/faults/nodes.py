"""Two nodes on this machine: network namespaces, joined by a cable that can be cut. The file system is shared."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

_LINK = "cable"
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET; Python 3.12 names it
_PROGRAMS = ("ip", "unshare", "nsenter")


class NoNodesError(OSError):
    """This machine does not let us make namespaces, or has not the programs for it."""


@dataclass(frozen=True)
class Nodes:
    """The namespaces live as long as these processes, and go with them."""

    pids: tuple[int, int]
    link: str = _LINK
    """The name of the interface, on both."""

    def address(self, node: int) -> str:
        return f"192.0.2.{node + 1}"

    def cut(self) -> None:
        """The second node is off the net from now on: what is sent to it gets no answer, not even a refusal."""
        _inside(self.pids[1], "ip", "link", "set", _LINK, "down")

    def mend(self) -> None:
        _inside(self.pids[1], "ip", "link", "set", _LINK, "up")

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
def two_nodes() -> Iterator[Nodes]:
    """Until the block ends. `NoNodesError` if this machine has no such thing."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        raise NoNodesError(f"not installed: {', '.join(missing)} (iproute2, util-linux)")
    with ExitStack() as stack:
        one, other = (stack.enter_context(_namespace()) for _ in range(2))
        nodes = Nodes((one, other))
        peer = ["peer", "name", _LINK, "netns", str(other)]
        _inside(one, "ip", "link", "add", _LINK, "type", "veth", *peer)
        for node, pid in enumerate(nodes.pids):
            _inside(pid, "ip", "address", "add", f"{nodes.address(node)}/24", "dev", _LINK)
            for interface in ("lo", _LINK):
                _inside(pid, "ip", "link", "set", interface, "up")
        yield nodes


@contextmanager
def _namespace() -> Iterator[int]:
    """The process that holds it: it ends when its input does, so with us at the latest."""
    command = ["unshare", "--net", "sh", "-c", "echo ready; exec cat"]
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
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "this thread cannot enter the namespace")
