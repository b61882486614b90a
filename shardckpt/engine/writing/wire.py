"""Messages between a rank and the process that writes for it: a length, then JSON; at most one descriptor beside it.

Who gives a `look` waits no longer for the other end than that lets it: its line must not block.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

LOOK_S = 0.1
"""How often somebody who waits for the other end looks whether to go on waiting."""

Look: TypeAlias = Callable[[], object]
"""Raises when nobody wants what is waited for any more."""

_HEAD = struct.Struct("<Q")


def send(line: socket.socket, message: dict[str, Any], *, file: int | None = None, look: Look | None = None) -> None:
    """Send a message; the other end gets a descriptor of `file` of its own."""
    content = json.dumps(message).encode()
    left = memoryview(_HEAD.pack(len(content)) + content)
    files = [] if file is None else [file]
    while left:
        _until(line, select.POLLOUT, look)
        with suppress(BlockingIOError):
            sent = socket.send_fds(line, [left], files)
            left, files = left[sent:], []


def receive(line: socket.socket, *, look: Look | None = None) -> tuple[dict[str, Any], int | None]:
    """The next message and the descriptor that came with it. `EOFError` at the end."""
    files: list[int] = []
    try:
        (length,) = _HEAD.unpack(_exactly(line, _HEAD.size, files, look))
        message: dict[str, Any] = json.loads(_exactly(line, length, files, look))
    except BaseException:
        for file in files:
            os.close(file)
        raise
    return message, files[0] if files else None


def _exactly(line: socket.socket, nbytes: int, files: list[int], look: Look | None) -> bytes:
    content = b""
    while len(content) < nbytes:
        _until(line, select.POLLIN, look)
        part, came, _, _ = socket.recv_fds(line, nbytes - len(content), 1)
        files += came
        if not part:
            raise EOFError("the other process has closed the line")
        content += part
    return content


def _until(line: socket.socket, event: int, look: Look | None) -> None:
    """Wait until the line is ready for it, or is no more; not `select.select`, which knows 1024 descriptors only."""
    if look is None:
        return
    poll = select.poll()
    poll.register(line, event)
    while not poll.poll(1000 * LOOK_S):
        look()
