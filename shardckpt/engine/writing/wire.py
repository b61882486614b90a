"""Messages between a rank and the process that writes for it: a length, then JSON; at most one descriptor beside it."""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any

_HEAD = struct.Struct("<Q")


def send(line: socket.socket, message: dict[str, Any], *, file: int | None = None) -> None:
    """Send a message; the other end gets a descriptor of `file` of its own."""
    content = json.dumps(message).encode()
    framed = _HEAD.pack(len(content)) + content
    sent = socket.send_fds(line, [framed], [] if file is None else [file])
    line.sendall(framed[sent:])


def receive(line: socket.socket) -> tuple[dict[str, Any], int | None]:
    """The next message and the descriptor that came with it. `EOFError` at the end."""
    files: list[int] = []
    try:
        (length,) = _HEAD.unpack(_exactly(line, _HEAD.size, files))
        message: dict[str, Any] = json.loads(_exactly(line, length, files))
    except BaseException:
        for file in files:
            os.close(file)
        raise
    return message, files[0] if files else None


def _exactly(line: socket.socket, nbytes: int, files: list[int]) -> bytes:
    content = b""
    while len(content) < nbytes:
        part, came, _, _ = socket.recv_fds(line, nbytes - len(content), 1)
        files += came
        if not part:
            raise EOFError("the other process has closed the line")
        content += part
    return content
