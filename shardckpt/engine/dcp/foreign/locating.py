"""What the small pieces of an archive say of the one tensor in it: where its bytes are, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardckpt.engine.loading.fetching.fetch import NO_SUM
from shardckpt.format.foreign.dcp import Payload, StoredChunk
from shardckpt.format.foreign.saved import LOCAL, Member, is_alone, order_of
from shardckpt.format.index import StoredRecord
from shardckpt.format.restricted.foreign import StoredView

_MOST_PICKLE = 64 << 10
"""Bytes of the pickle of a single tensor, and of the padding behind it."""


@dataclass(frozen=True, slots=True)
class Located:
    """The bytes of a tensor in a file: row-major, with its dimensions in this `order`."""

    file: str
    record: StoredRecord
    order: tuple[int, ...]


def check_order(members: Mapping[str, Member]) -> None:
    order = members.get("byteorder")
    if order is not None and order.nbytes != len("little"):
        raise ValueError("it was written by a machine of the other byte order")


def pair(members: Mapping[str, Member]) -> tuple[Member, Member]:
    """The pickle and the data of the archive of one tensor."""
    check_order(members)
    data = [name for name in members if name.startswith("data/")]
    if len(data) != 1 or "data.pkl" not in members:
        raise ValueError("it is not one saved tensor")
    pickle = members["data.pkl"]
    if pickle.limit - pickle.header > _MOST_PICKLE or pickle.limit - pickle.header < LOCAL:
        raise ValueError("its pickle is larger than that of a tensor")
    return pickle, members[data[0]]


def has_sums(members: Mapping[str, Member]) -> bool:
    """Not so after `torch.serialization.set_crc32_options(False)`, when all are 0."""
    return any(member.crc for member in members.values())


def crc_of(member: Member, members: Mapping[str, Member]) -> int:
    return member.crc if has_sums(members) else NO_SUM


def check_place(place: Any, data: Member, dtype: str, chunk: StoredChunk) -> None:
    if type(place) is not StoredView or f"data/{place.key}" != data.name or data.nbytes != place.storage_nbytes:
        raise ValueError("it is not one saved tensor")
    if place.dtype != dtype or place.shape != chunk.lengths:
        raise ValueError(f"it is {place.dtype} {list(place.shape)}, but should be {dtype} {list(chunk.lengths)}")


def located(payload: Payload, place: StoredView, start: int, crc: int) -> Located:
    order = order_of(place)
    if order is None or not is_alone(place):
        raise ValueError("it is a part of a larger storage, which DCP never writes")
    shape = tuple(place.shape[d] for d in order)
    return Located(payload.file, StoredRecord(place.dtype, shape, start, place.nbytes, crc), order)
