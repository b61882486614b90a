"""The consolidated file put by all ranks at once, each a stretch of it, from the parts that all of them have written.

What a rank must know to find where the bytes of its stretch lie is what the ranks hold, once for each kind of them, and
the CRCs of the tensors, which rank 0 has joined from the sums of all: as much as the model has tensors. The tail, which
has the nested state, comes from rank 0, which puts the last stretch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardckpt.engine.consolidated.assembling.assemble import Archive
from shardckpt.engine.consolidated.assembling.reading import Parts
from shardckpt.engine.consolidated.assembling.whole import Kind, Whole, WholeTensor
from shardckpt.engine.consolidated.holding import FlatPiece
from shardckpt.engine.consolidated.inventory import Inventory
from shardckpt.engine.loading.integrity import zero_crc
from shardckpt.engine.saving.share import least_share, share_out
from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.archive import Tail
from shardckpt.format.checksum import all_from_hex, to_hex
from shardckpt.storage.base import Buffer, PutPart, RenamingStorage, SharedPuts, Storage, UploadId

LEAST = 32 << 20
"""Bytes that make another rank that puts the file worth the messages."""


def is_worth_it(storage: Storage, nbytes: int, ranks: int) -> bool:
    """Whether several ranks put a file of so many bytes of tensors."""
    return ranks > 1 and nbytes >= 2 * LEAST and least_share(storage) is not None


@dataclass(frozen=True)
class Terms:
    """What all ranks know of the file."""

    whole: Whole
    crcs: tuple[int, ...]
    upload: UploadId = ""

    @classmethod
    def encode(
        cls, kinds: Sequence[Kind], flat: Sequence[Sequence[FlatPiece]], tensors: Sequence[WholeTensor], upload: str
    ) -> dict[str, Any]:
        """As a message of rank 0."""
        return {
            "kinds": [[kind.inventory.encode(), list(kind.ranks)] for kind in kinds],
            "flat": [[piece.encode() for piece in pieces] for pieces in flat],
            "crcs": "".join(to_hex(tensor.crc) for tensor in tensors),
            "upload": upload,
        }

    @classmethod
    def decode(cls, content: Any) -> Terms:
        kinds = [Kind(Inventory.decode(inventory), tuple(ranks)) for inventory, ranks in content["kinds"]]
        flat = [[FlatPiece.decode(piece) for piece in pieces] for pieces in content["flat"]]
        whole = Whole(kinds, flat, plain_in_files=len(kinds) > 1)
        return cls(whole, all_from_hex(content["crcs"], len(content["crcs"]) // 8), content["upload"])

    def tensors(self) -> list[WholeTensor]:
        described = zip(self.whole.described(), self.crcs, strict=True)
        return [WholeTensor(name, dtype, shape, crc, ()) for (name, dtype, shape), crc in described]


def put_stretch(parts: Parts, key: str, terms: Terms, *, ranks: int, tail: Tail | None) -> dict[str, Any]:
    """On every rank: put its stretch of the file. Gives what rank 0 must know of it: JSON.

    `tail` on rank 0. `CheckpointDamagedError` if the parts are not what their ranks held.
    """
    archive, storage = Archive(terms.tensors()), parts.storage
    share = share_out(archive.layout.tail, home="model", sharers=ranks, place=parts.rank, least=LEAST)
    if share.is_empty:
        return {"partly": {}, "parts": []}
    partly: dict[str, int] = {}
    last = b"" if tail is None else tail.content
    assert share.tail == bool(last), "rank 0 has the last stretch"

    def content() -> Iterator[Buffer]:
        yield from archive.windows(parts, terms.whole.located(terms.crcs), share.range, partly=partly)
        if last:
            yield last

    put: Sequence[PutPart] = ()
    if isinstance(storage, RenamingStorage):
        storage.put_range(key, share.start, content())
    else:
        assert isinstance(storage, SharedPuts), "else it is not worth it"
        nbytes = share.end - share.start + len(last)
        put = storage.put_parts(key, terms.upload, content(), numbers=share.numbers, nbytes=nbytes)
    return {"partly": partly, "parts": [[part.number, part.tag, part.nbytes] for part in put]}


def check(told: Iterable[Mapping[str, Any]], tensors: Sequence[WholeTensor], where: str) -> None:
    """On rank 0: the tensors of which several ranks have put some. `CheckpointDamagedError`."""
    sums: dict[str, int] = {}
    for each in told:
        for name, total in each["partly"].items():
            sums[name] = sums.get(name, 0) ^ total
    wrong = [t.name for t in tensors if t.name in sums and sums[t.name] ^ zero_crc(t.nbytes) != t.crc]
    if wrong:
        raise CheckpointDamagedError(
            f"{wrong[0]} is not what its ranks held: of a part of it {where} gives other bytes than were put there; "
            "save again, and test it"
        )


def finish_upload(storage: Storage, key: str, upload: UploadId, told: Iterable[Mapping[str, Any]]) -> None:
    """On rank 0, on an object store: make it an object."""
    if isinstance(storage, SharedPuts):
        storage.finish_upload(key, upload, [PutPart(*part) for each in told for part in each["parts"]])


def without_sources(tensors: Iterable[WholeTensor]) -> list[WholeTensor]:
    return [replace(tensor, sources=()) for tensor in tensors]
