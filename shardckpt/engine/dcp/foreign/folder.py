"""A checkpoint that DCP's own `FileSystemWriter` or `FsspecWriter` made: its keys, and where their bytes are.

Each chunk of a tensor is an archive of `torch.save`, somewhere in a `.distcp` file. Where the bytes are in it is found
in two small reads: its directory, at its end; then its pickle and the header of its data. Many chunks go together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import torch

from shardckpt.engine.dcp.foreign.locating import (
    Located,
    check_order,
    check_place,
    crc_of,
    has_sums,
    located,
    pair,
)
from shardckpt.engine.loading.fetching.fetch import NO_SUM
from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.checksum import crc32
from shardckpt.format.foreign.dcp import METADATA, DcpMetadata, Payload, StoredChunk, StoredTensor, decode_dcp_metadata
from shardckpt.format.foreign.saved import (
    LOCAL,
    TAIL,
    Member,
    decode_saved,
    map_values,
    members_of,
    restore,
)
from shardckpt.format.restricted.foreign import StoredView
from shardckpt.storage.base import Read, Storage

_BATCH = 512
"""Chunks whose headers are read together: 2 MiB."""
_AT_ONCE = 64 << 20
"""Bytes of values that are read together."""
_OF_RANKS = re.compile(r"__[0-9]+\.metadata")


@dataclass(frozen=True, slots=True)
class SavedValue:
    """A value, with a `StoredView` for each tensor in it, whose bytes are those of the record of that key."""

    tree: Any
    payload: Payload
    records: Mapping[str, tuple[int, int, int]]
    """(first byte in the file, bytes, CRC)"""


@dataclass(frozen=True, slots=True)
class Told:
    """The keys of a checkpoint, and where all chunks lie."""

    metadata: DcpMetadata
    located: Mapping[Payload, Located]


class DcpFolder:
    """Any thread may use it, several at once; opened by one process for itself.

    `CheckpointNotFoundError` where there is no such checkpoint, `CheckpointDamagedError` for what is not well-formed,
    `CheckpointLoadError` for what cannot be read now, or not without running code.
    """

    def __init__(self, storage: Storage, folder: str = "", *, told: Told | None = None) -> None:
        """`told`: what the metadata would say, where that stands elsewhere."""
        self._storage = storage
        self.folder = folder
        self.url = f"{storage.url.rstrip('/')}/{folder}".rstrip("/")
        self._sizes: dict[str, int] = {}
        self._located: dict[Payload, Located] = {}
        self._lock = Lock()
        if told is not None:
            self.digest, self.metadata = "", told.metadata
            self._located.update(told.located)
            return
        with self.told():
            try:
                content = storage.read(self.key(METADATA))
            except FileNotFoundError:
                raise self._missing() from None
        self.digest = f"{crc32(content):08x}.{len(content)}"
        """Of the metadata: ranks that load together must have read the same."""
        try:
            self.metadata = decode_dcp_metadata(content)
        except ValueError as error:
            raise CheckpointDamagedError(f"{self.url}: its {METADATA} cannot be read: {error}") from error

    def key(self, file: str) -> str:
        return f"{self.folder}/{file}" if self.folder else file

    def check_whole(self, names: Iterable[str]) -> None:
        """`CheckpointDamagedError` for tensors whose chunks overlap or leave holes: DCP itself would not notice."""
        entries = ((name, self.metadata.entries[name]) for name in names)
        torn = [name for name, entry in entries if isinstance(entry, StoredTensor) and not entry.is_whole]
        if torn:
            more = f" and {len(torn) - 5} more" if len(torn) > 5 else ""
            raise CheckpointDamagedError(
                f"{self.url}: the chunks of {', '.join(torn[:5])}{more} overlap or leave holes, so they are not these "
                "tensors. Was every rank's part saved, and by one save?"
            )

    def locate(self, chunks: Mapping[Payload, tuple[str, StoredChunk]]) -> dict[Payload, Located]:
        """Where the bytes of these chunks are; each comes with the dtype of its tensor."""
        with self._lock:
            found = {payload: self._located[payload] for payload in chunks if payload in self._located}
        pending = [payload for payload in chunks if payload not in found]
        for first in range(0, len(pending), _BATCH):
            new = self._find({payload: chunks[payload] for payload in pending[first : first + _BATCH]})
            found |= new
            with self._lock:
                self._located.update(new)
        return found

    def values(self, names: Iterable[str]) -> Iterator[tuple[str, SavedValue]]:
        """These values, of which not many are in memory at once."""
        for name, saved, _ in self._values(names):
            yield name, saved

    def live_values(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """The same with real tensors in them."""
        for name, saved, content in self._values(names):
            yield name, map_values(saved.tree, partial(self._restored, saved, content))

    def read_into(self, reads: Sequence[tuple[str, int, memoryview]]) -> None:
        with self.told():
            self._storage.read_into([Read(self.key(file), at, into) for file, at, into in reads])

    def _values(self, names: Iterable[str]) -> Iterator[tuple[str, SavedValue, bytes]]:
        wanted = [(name, self.metadata.entries[name]) for name in names]
        payloads = [(name, entry) for name, entry in wanted if isinstance(entry, Payload)]
        self._check_extents(payload for _, payload in payloads)
        while payloads:
            group: list[tuple[str, Payload]] = []
            total = 0
            while payloads and (not group or total + payloads[0][1].nbytes <= _AT_ONCE):
                group.append(payloads.pop(0))
                total += group[-1][1].nbytes
            contents = [bytearray(payload.nbytes) for _, payload in group]
            placed = zip(group, contents, strict=True)
            self.read_into([(payload.file, payload.at, memoryview(content)) for (_, payload), content in placed])
            for (name, payload), content in zip(group, contents, strict=True):
                yield name, self._decode(name, payload, bytes(content)), bytes(content)

    def _restored(self, saved: SavedValue, content: bytes, place: StoredView) -> torch.Tensor:
        at, nbytes, crc = saved.records[place.key]
        start = at - saved.payload.at
        data = bytearray(content[start : start + nbytes])
        if crc not in (NO_SUM, crc32(data)):
            raise self._damaged(saved.payload, "its bytes are not those that were written")
        return restore(place, data)

    def _decode(self, name: str, payload: Payload, content: bytes) -> SavedValue:
        try:
            members = members_of(content, payload.nbytes)
            heads = {key: content[member.header : member.header + LOCAL] for key, member in members.items()}
            starts = {key: (member.start(heads[key]), member) for key, member in members.items()}
            check_order(members)
            at, member = starts["data.pkl"]
            pickle = content[at : at + member.nbytes]
            if has_sums(members) and crc32(pickle) != member.crc:
                raise ValueError("its bytes are not those that were written")
            records = {
                key.removeprefix("data/"): (payload.at + at, member.nbytes, crc_of(member, members))
                for key, (at, member) in starts.items()
                if key.startswith("data/")
            }
        except (ValueError, KeyError) as error:
            raise self._damaged(payload, str(error), name) from error
        try:
            tree = decode_saved(pickle)
        except ValueError as error:
            raise CheckpointLoadError(
                f"{self.url}: {name} was saved as something that cannot be loaded without running code: {error}"
            ) from error
        saved = SavedValue(tree, payload, records)
        map_values(tree, lambda place: self._check_record(name, saved, place))
        return saved

    def _check_record(self, name: str, saved: SavedValue, place: StoredView) -> None:
        if place.key not in saved.records or saved.records[place.key][1] != place.storage_nbytes:
            raise self._damaged(saved.payload, "it has no such record as its pickle names", name)
        if place.nbytes > place.storage_nbytes:
            raise self._damaged(saved.payload, "it has a tensor of the same elements again and again", name)

    def _find(self, chunks: Mapping[Payload, tuple[str, StoredChunk]]) -> dict[Payload, Located]:
        self._check_extents(chunks)
        tails = {payload: bytearray(min(TAIL, payload.nbytes)) for payload in chunks}
        self.read_into([(p.file, p.at + p.nbytes - len(tail), memoryview(tail)) for p, tail in tails.items()])
        heads: dict[Payload, tuple[Member, bytearray, Member, bytearray]] = {}
        sums: dict[Payload, int] = {}
        for payload, tail in tails.items():
            with self._about(payload):
                pickle, data = pair(members := members_of(bytes(tail), payload.nbytes))
                sums[payload] = crc_of(data, members)
                heads[payload] = pickle, bytearray(pickle.limit - pickle.header), data, bytearray(LOCAL)
        self.read_into(
            [
                (payload.file, payload.at + member.header, memoryview(head))
                for payload, (pickle, first, data, second) in heads.items()
                for member, head in ((pickle, first), (data, second))
            ]
        )
        found = {}
        for payload, (pickle, first, data, second) in heads.items():
            with self._about(payload):
                at = pickle.start(bytes(first)) - pickle.header
                place = decode_saved(bytes(first[at : at + pickle.nbytes]))
                start = payload.at + data.start(bytes(second))
                check_place(place, data, *chunks[payload])
                found[payload] = located(payload, place, start, sums[payload])
        return found

    def _check_extents(self, payloads: Iterable[Payload]) -> None:
        """Before memory is taken for what the metadata only says is there."""
        for payload in payloads:
            if payload.file not in self._sizes:
                with self.told():
                    self._sizes[payload.file] = self._storage.size(self.key(payload.file))
            if payload.at + payload.nbytes > self._sizes[payload.file]:
                raise self._damaged(payload, f"the file has only {self._sizes[payload.file]} bytes")

    @contextmanager
    def _about(self, payload: Payload) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise self._damaged(payload, str(error)) from error

    def _damaged(self, payload: Payload, problem: str, name: str = "") -> CheckpointDamagedError:
        where = f"{name} ({payload.file}, bytes" if name else f"{payload.file} (bytes"
        return CheckpointDamagedError(
            f"{self.url} is damaged: {where} {payload.at} to {payload.at + payload.nbytes}): {problem}"
        )

    @contextmanager
    def told(self) -> Iterator[None]:
        """Errors of the storage, as what they mean for a load."""
        try:
            yield
        except (FileNotFoundError, EOFError) as error:
            raise CheckpointDamagedError(f"{self.url} is damaged: {error}") from error
        except OSError as error:
            raise CheckpointLoadError(f"{self.url} cannot be read now: {error}") from error

    def _missing(self) -> Exception:
        names = self._storage.list(self.folder)
        if any(_OF_RANKS.fullmatch(name) for name in names):
            return CheckpointLoadError(
                f"{self.url}: it was saved with use_collectives=False: each rank has metadata of its own, and nothing "
                "says how they belong together. Load it with DCP, and save it again with collectives"
            )
        return CheckpointNotFoundError(f"{self.url}: there is no committed checkpoint, and none of DCP's ({METADATA})")
