"""A gloo group used as a star: rank 0 talks with each other rank, and the others with rank 0 alone.

So each link stands for itself: when one rank dies, rank 0 sees which, and can still tell the others.

Facts about gloo that this file relies on (each tried with torch 2.13):
- When a process dies, its connections close, pending operations on them raise within 20 ms, and later ones raise
  when they are posted. Links to others stay usable.
- When a wait times out *inside* gloo, gloo closes all connections of the group ("Application timeout caused pair
  closure"). So rank 0 waits outside, with an event; a deliberate timeout hangs up whoever still refers to the group.
- With lazy initialisation only the links in use are connected, N - 1 instead of N * (N - 1) / 2. A lazily
  initialised device serves one group only: a second one on it fails with "Connect timeout".
- A child that the process has forked (a worker of a data loader) has its connections as well: while it lives on, the
  death of its parent closes none. So all waits are in turns with looks at which processes have ended (2026-11-26).
"""

from __future__ import annotations

import struct
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Work
from torch.distributed.distributed_c10d import GatherOptions, Store

from shardckpt.gang.wire.ending import close_at_the_end
from shardckpt.gang.wire.gloo import LinkError, open_group
from shardckpt.gang.wire.messages import ranks_text

_FRAME_NBYTES = 4096
"""A message travels in a frame of this size, what does not fit in a second piece of the length that it needs."""
_HEADER = struct.Struct("<QQI")
"""Stamp, length of the message in bytes, CRC-32 of stamp, length and the part of the message in this frame."""
_ROOM = _FRAME_NBYTES - _HEADER.size
_GREETING = 0
_NEVER_S = 3600.0
_UP, _UP_REST, _DOWN, _DOWN_REST, _PROBE = 1, 2, 3, 4, 5
_TAIL_S = 5.0
"""How long the rest of a message may take when its sender is known to be sending it."""
_LOOK_S = 1.0
"""Between two looks at whether a process has ended; what it had sent before arrives within that, too."""

Ended = Callable[[], Collection[int]]
"""The ranks of a star whose processes are known to have ended."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What rank 0 got: messages by rank; who is certain not to send one; who sent one of another time."""

    messages: dict[int, bytes]
    dead: tuple[int, ...] = ()
    astray: tuple[int, ...] = ()


class Star:
    """This rank's end of the star. Used by one thread; a `stamp` tells what a message belongs to."""

    def __init__(self, group: ProcessGroupGloo, ended: Ended) -> None:
        self._group: Any = group  # torch's stubs do not know its send, recv and gather
        self._ended = ended
        self._ear = ThreadPoolExecutor(1, "shardckpt-ear")
        """The others: waits for rank 0, since what waits inside gloo can look at nothing else."""
        close_at_the_end(self)
        self._rank, self._size = group.rank(), group.size()
        self._busy = self._spoiled = False
        self._called: list[Work] = []
        """Sent without waiting for the end; kept until that is certain."""
        self._unfinished: list[Work] = []
        """Kept, with the memory that they write to, until the links are closed."""

    @classmethod
    def open(cls, store: Store, *, rank: int, size: int, timeout: timedelta, ended: Ended, interface: str = "") -> Star:
        """Make a group of its own for these ranks and connect the links; all ranks at once, under a new prefix.

        `interface` is the network interface to use; by default the one that this host's name leads to.
        `LinkError` if a rank does not come; the store may block longer than `timeout`.
        """
        star = cls(open_group(store, rank=rank, size=size, timeout=timeout, interface=interface), ended)
        try:
            star._greet(timeout.total_seconds())
        except BaseException:
            star.close()
            raise
        return star

    @property
    def clean(self) -> bool:
        """False once an operation did not end as it should: messages may be under way that nobody waits for."""
        return not (self._busy or self._spoiled)

    def collect(self, stamp: int, *, timeout_s: float) -> Heard:
        """Rank 0: the others' messages. Ends when all are there, when a link closes, or at the timeout."""
        with self._operation():
            frames = {rank: bytearray(_FRAME_NBYTES) for rank in self._others()}
            works, dead = list[Work](), list[int]()
            for rank, frame in frames.items():
                try:
                    works.append(self._group.recv([_over(frame)], rank, _UP))
                except RuntimeError:
                    dead.append(rank)
            if not dead and self._ring(timeout_s):
                for work in works:
                    work.wait(timedelta(seconds=_TAIL_S))
                self._called.clear()
            else:
                self._spoiled = True
                self._unfinished += works
                dead = dead or sorted({*filter(self._is_closed, self._others()), *self._ended()})
            return self._opened(frames, stamp, tuple(dead))

    def send_up(self, message: bytes, stamp: int, *, timeout_s: float) -> None:
        """The others: give rank 0 a message; returns when rank 0 has begun to take it. `LinkError`."""
        with self._operation():
            work = self._group.send([_framed(message, stamp)], 0, _UP)
            # Not waited for: where another link closes just now, rank 0 may take the message and never the bell.
            self._called = [self._bell(timeout_s)]
            self._await(work, timeout_s)
            if len(message) > _ROOM:
                rest = _over(bytearray(message[_ROOM:]))
                self._await(self._group.send([rest], 0, _UP_REST), timeout_s)

    def tell(self, message: bytes, stamp: int, *, to: Iterable[int], timeout_s: float) -> tuple[int, ...]:
        """Rank 0: give a message to these ranks; returns those that did not take it in time (or are dead)."""
        end = time.monotonic() + timeout_s
        pieces = [(_DOWN, _framed(message, stamp))]
        if len(message) > _ROOM:
            pieces.append((_DOWN_REST, _over(bytearray(message[_ROOM:]))))
        works: dict[int, list[Work]] = {}
        failed = []
        for rank in to:
            try:
                works[rank] = [self._group.send([piece], rank, tag) for tag, piece in pieces]
            except RuntimeError:
                failed.append(rank)
        for rank, sent in works.items():
            try:
                for work in sent:
                    work.wait(timedelta(seconds=max(end - time.monotonic(), 0.01)))
            except RuntimeError:
                failed.append(rank)
        self._spoiled = self._spoiled or bool(failed)
        return tuple(sorted(failed))

    def call(self, message: bytes, stamp: int) -> None:
        """Rank 0: send a short message to all without waiting; a `collect` that gets all answers proves it arrived."""
        frame = _framed(message, stamp)
        for rank in self._others():
            with suppress(RuntimeError):  # the collect that follows finds out who is dead
                self._called.append(self._group.send([frame], rank, _DOWN))

    def listen(self, stamp: int, *, timeout_s: float) -> bytes:
        """The others: what rank 0 tells. `LinkError`, also when it is of another time."""
        with self._operation():
            frame = bytearray(_FRAME_NBYTES)
            self._await(self._group.recv([_over(frame)], 0, _DOWN), timeout_s)
            opened = _parse(frame)
            if opened is None or opened[0] != stamp:
                raise LinkError("rank 0 is at another point of the conversation, or in another one")
            return opened[2] + self._rest(0, _DOWN_REST, opened[1])

    def close(self) -> None:
        """Close all links at once and end gloo's threads. Idempotent; takes milliseconds."""
        self._spoiled = True
        if self._group is None:
            return
        for rank in self._others() if self._rank == 0 else (0,):
            try:
                self._group.recv([torch.zeros(1)], rank, _PROBE).wait(timedelta(milliseconds=1))
            except RuntimeError as error:
                if "Timed out" in str(error):
                    break
        self._ear.shutdown()  # its wait has ended with the links
        self._called.clear()
        self._unfinished.clear()
        self._group = None

    def _greet(self, timeout_s: float) -> None:
        """The first exchange connects the links, so that no later operation has to."""
        if self._rank:
            self.send_up(b"", _GREETING, timeout_s=timeout_s)
            self.listen(_GREETING, timeout_s=timeout_s)
            return
        heard = self.collect(_GREETING, timeout_s=timeout_s)
        # One that does not come takes all of the time: the others are not heard, and not to blame.
        silent = [*heard.dead] or [rank for rank in self._others() if rank not in heard.messages]
        silent += self.tell(b"", _GREETING, to=heard.messages, timeout_s=timeout_s)
        if silent:
            raise LinkError(f"no connection with {ranks_text(silent)}")

    def _others(self) -> range:
        return range(1, self._size)

    def _ring(self, timeout_s: float) -> bool:
        """Rank 0: wait until all have sent; False at the timeout, or at once when a link closes."""
        ended = threading.Event()
        try:
            bell = self._bell(timeout_s + _NEVER_S)  # the wait below ends first: gloo must not time out itself
            bell.get_future().add_done_callback(lambda _: ended.set())
            end = time.monotonic() + timeout_s
            gone = False
            while not ended.wait(min(_LOOK_S, max(end - time.monotonic(), 0.0))):
                if gone or time.monotonic() >= end:
                    return False
                gone = bool(self._ended())
            bell.wait()
        except RuntimeError:
            return False
        return True

    def _await(self, work: Work, timeout_s: float) -> None:
        """The others: until rank 0 has given or taken it. An error where it does not, or its process has ended."""
        waiting, gone = self._ear.submit(work.wait, timedelta(seconds=timeout_s)), False
        try:
            while not wait([waiting], _LOOK_S).done:
                if gone:
                    raise LinkError("rank 0 was killed, or has ended")
                gone = 0 in self._ended()
            waiting.result()
        finally:
            del waiting, work  # its error has this frame, which would have it: gloo's group and threads would stay

    def _bell(self, timeout_s: float) -> Work:
        """A gather of one byte: of all of gloo's operations the one that ends as soon as any link closes."""
        options = GatherOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=timeout_s)
        rung = [torch.zeros(1, dtype=torch.uint8) for _ in range(self._size)]
        bell: Work = self._group.gather([] if self._rank else [rung], [torch.zeros(1, dtype=torch.uint8)], options)
        return bell

    def _is_closed(self, rank: int) -> bool:
        try:
            self._group.recv([torch.zeros(1)], rank, _PROBE)
        except RuntimeError:
            return True
        return False

    def _opened(self, frames: dict[int, bytearray], stamp: int, dead: tuple[int, ...]) -> Heard:
        messages: dict[int, bytes] = {}
        astray = []
        for rank, frame in frames.items():
            opened = _parse(frame)
            if opened is None:
                continue
            if opened[0] != stamp:
                astray.append(rank)
                continue
            with suppress(RuntimeError):  # it died in the middle of its message
                messages[rank] = opened[2] + self._rest(rank, _UP_REST, opened[1])
        self._spoiled = self._spoiled or len(messages) < len(frames)
        return Heard(messages, dead, tuple(astray))

    def _rest(self, rank: int, tag: int, length: int) -> bytes:
        if length <= _ROOM:
            return b""
        rest = bytearray(length - _ROOM)
        self._group.recv([_over(rest)], rank, tag).wait(timedelta(seconds=_TAIL_S))
        return bytes(rest)

    @contextmanager
    def _operation(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
        except RuntimeError as error:
            raise LinkError(str(error)) from None
        self._busy = False


def _framed(message: bytes, stamp: int) -> Tensor:
    frame = bytearray(_FRAME_NBYTES)
    head = message[:_ROOM]
    frame[_HEADER.size : _HEADER.size + len(head)] = head
    _HEADER.pack_into(frame, 0, stamp, len(message), _checksum(stamp, len(message), head))
    return _over(frame)


def _parse(frame: bytearray) -> tuple[int, int, bytes] | None:
    """Stamp, length of the whole message, its part in this frame; None if the frame has not (wholly) arrived."""
    stamp, length, checksum = _HEADER.unpack_from(frame)
    head = bytes(frame[_HEADER.size : _HEADER.size + min(length, _ROOM)])
    return (stamp, length, head) if checksum == _checksum(stamp, length, head) else None


def _checksum(stamp: int, length: int, head: bytes) -> int:
    return zlib.crc32(head, zlib.crc32(struct.pack("<QQ", stamp, length)))


def _over(memory: bytearray) -> Tensor:
    """A tensor over this memory, which it keeps alive."""
    return torch.frombuffer(memory, dtype=torch.uint8)
