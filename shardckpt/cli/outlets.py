"""Standard output and error, whatever they are: a pipe whose reader goes away, closed, or a file on a full disk.

A command does all of its work and ends with the status that it would have had, whether somebody reads to the end or
not: `shardckpt verify runs/a | head -1` tells by its status whether all is sound.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any


def prepare() -> None:
    """Called once, before anything is printed or opened, in the main thread."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: a file that is opened must not get this number, and what is printed with it
            os.open(os.devnull, os.O_RDWR)  # gets the lowest that is free, which is this one
    sys.stdout = _stream(sys.stdout, 1, "stdout")
    sys.stderr = _stream(sys.stderr, 2, "stderr")


def _stream(known: Any, number: int, name: str) -> io.TextIOWrapper:
    """As Python's own, which is None if it was closed; but what cannot be encoded (names of files) is escaped."""
    errors = getattr(known, "errors", "strict")
    return io.TextIOWrapper(
        io.BufferedWriter(_Outlet(number, name)),
        encoding=getattr(known, "encoding", None),
        errors="backslashreplace" if errors == "strict" else errors,
        line_buffering=number == 2 or getattr(known, "line_buffering", False),
    )


class _Outlet(io.FileIO):
    """An open descriptor. What nobody will read any more is dropped, as is all that comes after an error."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(number, "w", closefd=False)
        self._what = what

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                raise OSError(f"cannot write to {self._what}: {error.strerror}") from error
            return memoryview(content).nbytes
