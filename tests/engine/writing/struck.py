"""The process that writes, as the tests have it: struck once, in one phase of what it does. It imports no torch.

`WriterProcess` starts it in the place of the real one (`start_struck`), and tells it `struck` with all the rest: the
phase, what happens then, and a folder, in which each such process leaves its number, and the test arms it.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardckpt.engine.writing import child, wire

AT_START = ("start", "open", "map")
"""Which a process comes to once, or once for each image."""
IN_PUT = ("put", "create", "created", "bytes", "sync", "close", "reply", "half a reply")
BETWEEN = "between two files"
AFTER = "between two saves"
LAST = "end"
KINDS = ("is killed", "raises", "hangs", "stops")


class Fault:
    """What happens when the process comes to the phase and the test has armed it, once."""

    def __init__(self, phase: str, kind: str, folder: str) -> None:
        self.phase, self._kind, self._folder = phase, kind, Path(folder)
        self.written = ""
        """Of the file that was written last, the key."""
        (self._folder / f"born_{os.getpid()}").touch()

    def at(self, phase: str) -> None:
        if phase != self.phase:
            return
        try:
            (self._folder / "armed").rename(self._folder / "met")
        except FileNotFoundError:
            return
        if self._kind == "raises":
            raise RuntimeError("injected")
        if self._kind == "hangs":
            threading.Event().wait()
        os.kill(os.getpid(), signal.SIGKILL if self._kind == "is killed" else signal.SIGSTOP)


def main(line_file: int) -> None:
    real: Callable[..., Any] = child.receive

    def first(line: socket.socket) -> Any:
        told, file = real(line)
        fault = Fault(*told.pop("struck"))
        child.receive = _receive(fault)  # type: ignore[assignment]
        _put_in_the_way(fault)
        if fault.phase == LAST:
            _be_deaf()
        fault.at("start")
        return told, file

    child.receive = first  # type: ignore[assignment]
    child.main(line_file)


def _receive(fault: Fault) -> Callable[[socket.socket], Any]:
    def receive(line: socket.socket) -> Any:
        if fault.written:
            fault.at(AFTER if "rank_" in fault.written else BETWEEN)  # the files of a rank's own come last
        try:
            return wire.receive(line)
        except EOFError:
            fault.at(LAST)
            raise

    return receive


def _be_deaf() -> None:
    """The thread that looks after the line ends nothing, as where a client holds the interpreter's lock."""
    real = os._exit

    def leave(status: int) -> None:
        if threading.current_thread() is threading.main_thread():
            real(status)

    os._exit = leave  # type: ignore[assignment]


def _put_in_the_way(fault: Fault) -> None:
    """Strike before the thing is done, where nothing else is said. Of files only those of a checkpoint are meant."""
    files: set[int] = set()

    def striking(phase: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*args: Any, **options: Any) -> Any:
            if phase not in ("sync", "close") or args[0] in files:
                fault.at(phase)
            return act(*args, **options)

        return struck

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        ours = bool(flags & os.O_CREAT) and str(path).endswith(".pt")
        if ours:
            fault.at("create")
        file = real_open(path, flags, *args, **options)
        if ours:
            files.add(file)
            fault.at("created")
        return file

    def written(file: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if fault.phase != "bytes":
            return int(real_write(file, buffers, offset, *flags))
        done = real_write(file, [buffers[0][: -(-len(buffers[0]) // 2)]], offset)
        fault.at("bytes")
        return int(done)

    def sent(line: socket.socket, answer: dict[str, Any]) -> None:
        fault.at("reply")
        near, far = socket.socketpair()
        with near, far:
            wire.send(near, answer)
            content = far.recv(1 << 16)
        line.sendall(content[:11])
        fault.at("half a reply")
        line.sendall(content[11:])

    def do(writer: child._Writer, told: dict[str, Any]) -> dict[str, Any]:
        fault.at("put")
        answer = real_do(writer, told)
        fault.written = told["key"]
        return answer

    real_open, real_write, real_do = os.open, os.pwritev, child._Writer.do
    os.open, os.pwritev = opened, written
    os.fsync, os.close = striking("sync", os.fsync), striking("close", os.close)
    mmap.mmap = striking("map", mmap.mmap)  # type: ignore[misc, assignment]
    child.open_storage = striking("open", child.open_storage)
    child.send = sent  # type: ignore[assignment]
    child._Writer.do = do  # type: ignore[method-assign]
