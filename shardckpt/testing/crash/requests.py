"""The same for object stores: requests are recorded, and what a job that dies between them may leave is made.

A request that was answered has happened. One that was not answered has happened, or never will, or happens later, when
the next job is at work already; a deletion of several objects may have happened in part.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from shardckpt.storage.base import Buffer, PutPart, UploadId
from shardckpt.storage.memory import MemoryObjects
from shardckpt.storage.transfer.ranges import as_bytes
from shardckpt.testing.crash.operations import Allowed, Ledger, Mark

Kind = Literal["put", "replace", "swap", "delete", "delete_tree", "begin_upload", "finish_upload", "abort_upload"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request that changes something. A deletion of several objects is several of these."""

    kind: Kind
    key: str
    content: bytes = b""
    refuses: bool = True
    """Of a put or the end of an upload: whether it fails where there is an object already."""
    old: bytes = b""
    """Of a swap: the only content that it replaces."""

    def carry_out(self, storage: MemoryObjects) -> None:
        """As the server does: a put over what is there is refused, and a swap of what is not there."""
        if self.kind == "replace" or (self.kind in ("put", "finish_upload") and not self.refuses):
            storage.replace(self.key, self.content)
        elif self.kind in ("put", "finish_upload"):
            with suppress(FileExistsError):
                storage.put(self.key, [self.content])
        elif self.kind == "swap":
            with suppress(FileExistsError, FileNotFoundError):
                storage.swap(self.key, self.old, self.content)
        elif self.kind == "delete":
            storage.delete([self.key])
        elif self.kind == "delete_tree":
            storage.delete_tree(self.key)
        elif self.kind == "begin_upload":
            storage.begin_upload(self.key)
        if self.kind in ("finish_upload", "abort_upload"):
            for key, upload in storage.list_uploads():
                if key == self.key:
                    storage.abort_upload(key, upload)


@dataclass(frozen=True, slots=True)
class Sent:
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    sent: Sent


@dataclass(frozen=True, slots=True)
class Lost:
    """An object is gone, by no request of the job: it cannot come late."""

    key: str


Event = Sent | Answered | Lost | Mark


class RecordedObjects(MemoryObjects):
    """An object store that notes what is asked of it, and when it has answered. Any thread may call."""

    def __init__(self, name: str = "recorded", *, refuses: bool = True) -> None:
        """`refuses=False`: a server that creates an object where there is one already."""
        super().__init__(name)
        self.events: list[Event] = []
        self._refuses = refuses

    def begun(self, step: int, version: object) -> None:
        """As of a `Recorder`."""
        self._note(Mark(step, version))

    def acknowledged(self, step: int, version: object) -> None:
        self._note(Mark(step, version, acknowledged=True))

    def lose(self, key: str) -> None:
        """An accident."""
        super().delete([key])
        self._note(Lost(key))

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        content = b"".join(map(as_bytes, parts))
        sent = self._send(Request("put", key, content, self._refuses))
        nbytes = super().put(key, [content])
        self._note(Answered(sent))
        return nbytes

    def replace(self, key: str, content: bytes) -> None:
        sent = self._send(Request("replace", key, bytes(content)))
        super().replace(key, content)
        self._note(Answered(sent))

    def swap(self, key: str, old: bytes, new: bytes) -> None:
        sent = self._send(Request("swap", key, bytes(new), old=bytes(old)))
        super().swap(key, old, new)
        self._note(Answered(sent))

    def delete(self, keys: Iterable[str]) -> None:
        every = list(keys)
        sent = self._send(*(Request("delete", key) for key in every))
        super().delete(every)
        self._note(Answered(sent))

    def delete_tree(self, prefix: str) -> None:
        with self._lock:
            below = [key for key in self._objects if key.startswith(prefix.rstrip("/") + "/")]
        sent = self._send(*(Request("delete", key) for key in below), Request("delete_tree", prefix))
        super().delete_tree(prefix)
        self._note(Answered(sent))

    def begin_upload(self, key: str) -> UploadId:
        sent = self._send(Request("begin_upload", key))
        upload = super().begin_upload(key)
        self._note(Answered(sent))
        return upload

    def finish_upload(self, key: str, upload: UploadId, parts: Sequence[PutPart]) -> None:
        with self._lock:
            put = self._parts(key, upload)
            content = b"".join(put[part] for part in sorted(parts, key=lambda part: part.number))
        sent = self._send(Request("finish_upload", key, content, self._refuses))
        super().finish_upload(key, upload, parts)
        self._note(Answered(sent))

    def _send(self, *requests: Request) -> Sent:
        sent = Sent(requests)
        self._note(sent)
        return sent

    def _note(self, event: Event) -> None:
        with self._lock:
            self.events.append(event)


@dataclass(frozen=True, slots=True)
class Left:
    """What a job has left that died after some of the events."""

    prefix: int
    done: tuple[Request, ...]
    late: tuple[Request, ...]
    """What may still come."""
    allowed: Allowed

    def storage(self) -> MemoryObjects:
        """The store as it is found."""
        found = MemoryObjects("left")
        for request in self.done:
            request.carry_out(found)
        return found


def left(events: Sequence[Event], *, count: int, seed: int, before: Sequence[Request] = ()) -> Iterator[Left]:
    """At most `count` different ones, the same for the same seed: after every prefix what was not answered has
    happened, or has not, or comes late; then in part."""
    seen: set[int] = set()
    for number in range(count):
        fresh = len(seen)
        for each in _prefixes(events, number, seed, tuple(before)):
            found = each.storage()
            objects = frozenset(found._objects.items())
            key = hash((objects, frozenset(found.list_uploads()), each.late, frozenset(each.allowed.items())))
            if key not in seen:
                seen.add(key)
                yield each
                if len(seen) == count:
                    return
        if len(seen) == fresh and number > 12:
            return


def _prefixes(events: Sequence[Event], number: int, seed: int, before: tuple[Request, ...]) -> Iterator[Left]:
    done, waiting, ledger = list(before), list[Sent](), Ledger()
    for prefix, event in enumerate([*events, None]):
        if isinstance(event, Mark):
            ledger.tell(event)
        draw = random.Random(f"{seed}/{prefix}/{number}")
        now, late = list(done), list[Request]()
        for sent in waiting:
            for request in sent.requests:
                fate = ("done", "never", "late")[number] if number < 3 else draw.choice(("done", "never", "late"))
                if fate != "never":
                    (now if fate == "done" else late).append(request)
        yield Left(prefix, tuple(now), tuple(late), ledger.allowed)
        if isinstance(event, Sent):
            waiting.append(event)
        elif isinstance(event, Answered):
            waiting.remove(event.sent)
            done += event.sent.requests
        elif isinstance(event, Lost):
            done.append(Request("delete", event.key))
