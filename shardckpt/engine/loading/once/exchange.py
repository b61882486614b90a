"""Fetch what is one's own of what a group reads, and pass it on. On every rank, in the conversation of a load."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from typing import Any

from shardckpt.engine.loading.fetching.meter import UNWATCHED, Meter, read_metered
from shardckpt.engine.loading.once.groups import Group, blocks, by_key, digests, find_groups
from shardckpt.engine.patience import within
from shardckpt.gang.announce import announce
from shardckpt.gang.base import Gang
from shardckpt.gang.relay import Relay, Relaying
from shardckpt.gang.together import together, together_gather
from shardckpt.storage.base import Read, RenamingStorage, Storage

Blocks = list[list[Read]]


def is_worth_while(storage: Storage, gang: Gang) -> bool:
    """On file systems each rank reads for itself: the page cache has it, or the network file system is built for it."""
    return gang.size > 1 and not isinstance(storage, RenamingStorage) and isinstance(gang, Relaying)


def read_once(
    storage: Storage,
    gang: Gang,
    plan: Callable[[], Sequence[Read]],
    *,
    timeout: timedelta,
    step: int,
    meter: Meter = UNWATCHED,
) -> frozenset[str]:
    """Fill the destinations of what several ranks read alike, each byte being fetched by one of them; gives the keys
    of the objects that are done. `plan` gives this rank's reads; what it raises is an error on all.

    Three phases: all say what they read, fetch their share, and pass it on. Nothing is passed on before all have what
    is theirs, so a rank that fails to fetch keeps nobody waiting.
    """
    terms: dict[str, Any] = {"phase": "read", "timeout": timeout, "step": step}
    own: dict[str, list[Read]] = {}

    def say() -> Any:
        own.update(by_key(within(timeout, plan, what="planning the reads")))
        return digests(own)

    said: Any = together_gather(gang, say, **terms)

    def find() -> Any:
        return [secrets.token_hex(8), [[group.ranks, group.keys] for group in find_groups(said)]]

    name, found = announce(gang, find, **terms)
    groups = [Group(tuple(ranks), tuple(keys)) for ranks, keys in found]
    if not groups:
        return frozenset()
    mine = [
        (f"{name}.{number}", group, blocks([read for key in group.keys for read in own[key]]))
        for number, group in enumerate(groups)
        if gang.rank in group.ranks
    ]
    fetched = [read for _, group, those in mine for read in _share(group, those, gang.rank)]
    meter.begin("reading", (len(read.into) for read in fetched))
    together(gang, lambda: within(timeout, lambda: read_metered(storage, fetched, meter), what="reading"), **terms)
    meter.begin("exchanging", (_nbytes(block) for _, _, those in mine for block in those))

    def pass_on() -> None:
        assert isinstance(gang, Relaying)
        for title, group, those in mine:
            with closing(gang.open_relay(group.ranks, name=title, timeout=timeout)) as relay:
                _pass_on(relay, group, those, gang.rank, meter)

    together(gang, lambda: within(timeout, pass_on, what="passing on what was read"), **terms)
    return frozenset(key for _, group, _ in mine for key in group.keys)


def _share(group: Group, those: Blocks, rank: int) -> list[Read]:
    """What this rank fetches for its group: every n-th block."""
    return [read for block in those[group.ranks.index(rank) :: len(group.ranks)] for read in block]


def _pass_on(relay: Relay, group: Group, those: Blocks, rank: int, meter: Meter) -> None:
    for number, block in enumerate(those):
        source = group.ranks[number % len(group.ranks)]
        if len(block) == 1:
            relay.pass_on(block[0].into, source=source)
            meter.add(_nbytes(block))
            continue
        # Many small ones as one: each message costs as much as a hundred kilobytes.
        packed = bytearray().join(read.into for read in block) if rank == source else bytearray(_nbytes(block))
        relay.pass_on(memoryview(packed), source=source)
        if rank != source:
            _unpack(block, memoryview(packed))
        meter.add(_nbytes(block))


def _nbytes(block: Sequence[Read]) -> int:
    return sum(len(read.into) for read in block)


def _unpack(block: Sequence[Read], packed: memoryview) -> None:
    at = 0
    for read in block:
        read.into[:] = packed[at : at + len(read.into)]
        at += len(read.into)
