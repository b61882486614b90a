"""A storage whose large puts another process does, which maps the images of the files and is told ranges of them.

It is started at the first put, and anew after it has died, or has been killed because a save was cancelled or came to
its deadline: that put fails, and the next one succeeds. This is what it is for: a client that hangs or crashes does so
over there, and can be ended, which no thread can.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import shardckpt.engine.writing.child as child
from shardckpt.engine.background.manners import Manners
from shardckpt.engine.writing.shared import SharedMap, place_in
from shardckpt.engine.writing.wire import LOOK_S, Look, receive, send
from shardckpt.storage.base import Buffer, PutPart, Storage, UploadId
from shardckpt.storage.wrapping import StorageWrapper

# Not for speed, or not here. How much a loop in pure Python gets done beside a save, in thousands of rounds per second,
# and its longest pause, medians of 7 alternating saves (S3: 5) with range; 2 cores, on which much else ran:
#
#                                    no save           thread writes     process writes
#   0.5 GB in 100 tensors, disk      76 (57-100)       64 (53-112)       64 (48-121)
#     longest pause, ms              12 (9-29)         17 (9-33)         19 (6-23)
#     put, ms                                          258 (243-359)     272 (244-324)
#   0.2 GB in 20 tensors, S3 (moto)  95 (58-156)       56 (48-84)        60 (44-79)
#     longest pause, ms              13 (3-16)         52 (33-73)        40 (21-64)
#     put, s                                           8.7 (5.5-9.5)     6.9 (4.8-10.3)
#
# Checksums and system calls let go of the interpreter's lock anyway. What holds it for long is the making of index and
# record of 20,000 tensors (a pause of 0.1 s and more), which is done here in both cases. So it is off by default.

_log = logging.getLogger(__name__)

_PACKAGE = Path(child.__file__).parents[3]
_FAREWELL_S = 5.0
"""How long the process may take to end by itself when it is told to; it may be in the middle of a system call."""


class WriterProcess:
    """The other process, while there is one. Any thread may call; one put at a time."""

    def __init__(self, root: str, options: Mapping[str, object] | None, manners: Manners) -> None:
        """`options` travel as JSON, over a line that nobody else can read."""
        told = {name: value for name, value in asdict(manners).items() if name != "process"}
        self._told: dict[str, Any] = {"root": root, "options": dict(options or {}), "manners": told}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._maps: weakref.WeakKeyDictionary[SharedMap, int] = weakref.WeakKeyDictionary()
        self._numbers = 0
        self._retries = 0

    @property
    def pid(self) -> int | None:
        """None while there is no process."""
        process = self._process
        return None if process is None else process.pid

    @property
    def retries(self) -> int:
        """How many tries it and those before it have made beyond the first ones, in puts that they could answer."""
        return self._retries

    def put(self, key: str, parts: Sequence[Buffer]) -> int:
        """As `Storage.put`, of parts that all lie in shared memory.

        Parts may raise when they are looked at: then the save was cancelled, and the process is killed.
        """
        return int(self._ask("put", key, parts)["nbytes"])

    def put_range(self, key: str, offset: int, parts: Sequence[Buffer]) -> int:
        """As `RenamingStorage.put_range`, else as `put`."""
        return int(self._ask("put_range", key, parts, offset=offset)["nbytes"])

    def put_parts(self, key: str, upload: UploadId, parts: Sequence[Buffer], *, numbers: range) -> tuple[PutPart, ...]:
        """As `SharedPuts.put_parts`, else as `put`."""
        put = self._ask("put_parts", key, parts, upload=upload, numbers=[numbers.start, numbers.stop])["put"]
        return tuple(PutPart(*part) for part in put)

    def _ask(self, verb: str, key: str, parts: Sequence[Buffer], **terms: object) -> dict[str, Any]:
        """Its answer, or what the storage there has raised."""

        def look() -> None:
            _ = parts[0]

        while not self._lock.acquire(timeout=LOOK_S):  # a put that was cancelled is about to end the process
            look()
        try:
            look()  # a save that was given up while it waited here needs no process
            line = self._ready(look)
            ranges = [self._range(line, part, look) for part in parts]
            living = sorted(self._maps.values())
            send(line, {"verb": verb, "key": key, "parts": ranges, "living": living, "terms": terms}, look=look)
            answer, _ = receive(line, look=look)
            self._retries += answer["retries"]
        except (EOFError, ConnectionError) as error:
            raise OSError(f"cannot write {key!r}: the process that writes {self._end(kill=True)}") from error
        except BaseException:
            self._end(kill=True)
            raise
        finally:
            self._lock.release()
        if "error" in answer:
            if answer["errno"] is None:
                raise RuntimeError(f"the process that writes failed: {answer['error']}")
            raise OSError(answer["errno"], answer["error"])
        return answer

    def close(self) -> None:
        """Let the process end, or end it. May be called twice."""
        if not self._lock.acquire(timeout=2 * _FAREWELL_S):  # a put that was left behind has it, and is stuck
            _log.warning("the process that writes is left behind: it can be neither started nor ended")
            return
        try:
            self._end(kill=False)
        finally:
            self._lock.release()

    def _ready(self, look: Look) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self._end(kill=True)  # it died while there was nothing to do, which harms nobody
        if self._line is not None:
            return self._line
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as stack:
            stack.enter_context(ours)
            code = f"import sys; sys.path.insert(0, {str(_PACKAGE)!r}); from {child.__name__} import main; "
            # A new session: what a terminal, or a launcher, sends to the training's group is not for it.
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"{code}main({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.pop_all()
        ours.setblocking(False)
        self._line = ours
        self._maps.clear()
        send(ours, self._told, look=look)
        return ours

    def _range(self, line: socket.socket, part: Buffer, look: Look) -> tuple[int, int, int]:
        found = place_in(memoryview(part))
        assert found is not None, "looked at before"
        owner, start = found
        number = self._maps.get(owner)
        if number is None:
            number = self._numbers = self._numbers + 1
            send(line, {"map": number, "nbytes": len(owner)}, file=owner.file, look=look)
            self._maps[owner] = number
        return number, start, start + memoryview(part).nbytes

    def _end(self, *, kill: bool) -> str:
        """Be without a process; says how it ended."""
        process, line, self._process, self._line = self._process, self._line, None, None
        if line is not None:
            with suppress(OSError), line:  # also where a forked child holds the line, too
                line.shutdown(socket.SHUT_RDWR)
        if process is None:
            return "is not there"
        if not kill:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_FAREWELL_S)
        ended = process.poll()
        if ended is None:
            with suppress(subprocess.TimeoutExpired):  # after an end of the line it may be just about to end
                ended = process.wait(LOOK_S) if kill else None
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # not as long as it is in a system call that does not return
            process.wait(_FAREWELL_S)
        if ended is None:
            return "was ended"
        return f"was killed by {signal.Signals(-ended).name}" if ended < 0 else f"ended with status {ended}"


class ProcessStorage(StorageWrapper):
    """Puts of shared memory go to the other process, all else to `inner`, in this one."""

    def __init__(self, inner: Storage, writer: WriterProcess) -> None:
        super().__init__(inner)
        self.writer = writer
        self._seen = False
        """Whether something that the other process wrote has been seen from here."""

    @property
    def retries(self) -> int:
        """Of both processes."""
        return super().retries + self.writer.retries

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        shared = _shared(parts)
        if shared is None:
            return super().put(key, parts)
        return self._look(key, 0, self.writer.put(key, shared))

    def put_range(self, key: str, offset: int, parts: Iterable[Buffer]) -> int:
        shared = _shared(parts)
        if shared is not None:
            return self._look(key, offset, self.writer.put_range(key, offset, shared))
        inner: Any = self.inner
        nbytes: int = inner.put_range(key, offset, parts)
        return nbytes

    def put_parts(
        self, key: str, upload: UploadId, parts: Iterable[Buffer], *, numbers: range, nbytes: int | None = None
    ) -> tuple[PutPart, ...]:
        """What the other process puts elsewhere by mistake need not be looked for: no such upload is begun there."""
        shared = _shared(parts)
        if shared is not None:
            return self.writer.put_parts(key, upload, shared, numbers=numbers)
        inner: Any = self.inner
        put: tuple[PutPart, ...] = inner.put_parts(key, upload, parts, numbers=numbers, nbytes=nbytes)
        return put

    def _look(self, key: str, offset: int, nbytes: int) -> int:
        """Once, whether it is here what the other process has put."""
        if not self._seen:
            found = self.inner.size(key)  # `FileNotFoundError` if the other process has another place of that name
            if found < offset + nbytes:
                raise OSError(f"the process that writes has written {nbytes} bytes of {key!r}, and here are {found}")
            self._seen = True
        return nbytes

    def close(self) -> None:
        """Of the other process only."""
        self.writer.close()


def in_other_process(
    storage: Storage, root: object, options: Mapping[str, object] | None, manners: Manners
) -> ProcessStorage:
    """`ValueError` where a process by itself could not open the place."""
    if not isinstance(root, str | os.PathLike):
        raise ValueError("another process can write to a path or a URL only, and not to a storage that was made here")
    if not hasattr(os, "memfd_create"):
        raise ValueError("another process can write on Linux only")
    place = os.fspath(root)
    if "://" not in place:
        place = os.path.abspath(os.path.expanduser(place))
    made: ProcessStorage = ProcessStorage(storage, WriterProcess(place, options, manners))
    return made


def _shared(parts: Iterable[Buffer]) -> Sequence[Buffer] | None:
    """The parts, if all of them can be looked at more than once and lie in shared memory."""
    if isinstance(parts, Sequence) and len(parts) and all(place_in(memoryview(part)) for part in parts):
        return parts
    return None
