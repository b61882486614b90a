"""The operations of `acts` on an object store: what is left when the job dies between two requests, and goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

from shardckpt.engine.saving import share
from shardckpt.storage.base import Storage
from shardckpt.testing.crash.judge import Finding, Remembering, judge
from shardckpt.testing.crash.requests import Left, RecordedObjects, Request
from tests.crash.acts import ACTS, work
from tests.crash.ours import FOREIGN, NEXT, OurReader, recover
from tests.crash.tries import Tried

CASES = [(name, ranks) for name, act in ACTS.items() if act.exchanges for ranks in act.ranks if ranks < 4]
BEFORE = [Request("put", key, content) for key, content in FOREIGN.items()]


def record(
    name: str, ranks: int, *, refuses: bool = True, spoilt: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> RecordedObjects:
    """The requests of a job."""
    act, place = ACTS[name], RecordedObjects(refuses=refuses)
    for request in BEFORE:
        request.carry_out(place)
    place.events.clear()
    least = 4096 if act.shared else share.LEAST_OF_UPLOAD
    with mock.patch.multiple(share, LEAST_OF_UPLOAD=least, _GRAIN=4096 if act.shared else share._GRAIN), spoilt():
        work(act, ranks, lambda: place, place)
    return place


def come_last(each: Left, reader: Remembering, *, width: int) -> list[Finding]:
    """What was sent by the job that died arrives after the next one has saved those steps again."""
    place = each.storage()
    findings = recover(place, each.allowed, reader, width=width)
    own = OurReader(1)
    saved = [step for step in own.steps(place) if _version(own, place, step) == NEXT]
    for request in each.late:
        request.carry_out(place)
    for step in saved:
        found = _version(own, place, step) if step in own.steps(place) else None
        if found != NEXT:
            findings.append(Finding("lost", step, f"a late request of the dead job has put {found} in its place"))
    return findings


def _version(reader: OurReader, storage: Storage, step: int) -> object:
    try:
        return reader.version(storage, step)
    except Exception as error:
        return error


def try_left(lefts: Iterable[Left], reader: Remembering, *, width: int, recoveries: int, stop: bool = False) -> Tried:
    """Each is judged as it is found, and once more with what came late; then a job goes on while it comes."""
    tried = Tried()
    for each in lefts:
        tried.states += 1
        storage = each.storage()
        findings = judge(storage, each.allowed, reader)
        if not findings:
            for request in each.late:
                request.carry_out(storage)
            findings = judge(storage, each.allowed, reader)
        if not findings and tried.recovered < recoveries:
            tried.recovered += 1
            place = each.storage()
            late = [partial(request.carry_out, place) for request in each.late]
            findings = recover(place, each.allowed, reader, width=width, late=late)
            if not findings and each.late:
                findings = come_last(each, reader, width=width)
        for finding in findings:
            tried.findings[finding.kind] += 1
            there = sorted(storage._objects)
            tried.first = tried.first or f"after {each.prefix} events, late {each.late!r:.300}: {finding}; {there}"
        if stop and tried.findings:
            break
    return tried
