"""A sink that writes what `dcp.load` and `dcp_to_torch_save` of torch read, `.metadata` last. One process."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from shardckpt.engine.consolidated.blocks import Block, position
from shardckpt.engine.dcp.foreign.writing import Content, archive_of, encode_dcp_metadata
from shardckpt.errors import CheckpointError, CheckpointSaveError, InvalidStateError
from shardckpt.format.foreign.dcp import METADATA, DcpMetadata, Entry, Payload, StoredChunk, StoredTensor
from shardckpt.format.index import ITEMSIZE
from shardckpt.format.tree import MAX_LEVELS, TensorRef, check_value
from shardckpt.storage.base import Buffer, Storage
from shardckpt.storage.open import open_storage, options_for
from shardckpt.tools.moving.seam import TensorName, TensorSource, Window

_log = logging.getLogger(__name__)
_FILE_NBYTES = 4 << 30
"""A file is closed when it has this many bytes."""
_SHARE = 4
"""A chunk has at most this part of the budget: a storage may hold on to a few parts that are on their way."""

Keys: TypeAlias = tuple[str | int, ...]


class DcpSink:
    """A `TensorSink` that makes a folder of DCP's own, at a path or URL, or in an opened storage.

    Names are those that DCP would give: keys of dicts as texts, places of lists as numbers, joined by dots; tuples and
    other values are one item each. Tied tensors are written once, and found under each of their names. A tensor that
    is larger than a quarter of the budget is cut into chunks. There is no checkpoint before `.metadata` is there; if
    the write fails, what it has written is removed.

    `CheckpointSaveError` where there is something already, or writing fails; `InvalidStateError` for what cannot be
    stored.

    Args:
        where: a path, a URL, or a storage that was opened and stays open.
        folder: of the checkpoint in that storage; "" is its root.
        storage_options: for a URL; never logged.
    """

    def __init__(
        self,
        where: str | os.PathLike[str] | Storage,
        *,
        folder: str = "",
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        self._where = where
        self._folder = folder
        self._options = storage_options

    def write(self, source: TensorSource, *, budget_nbytes: int) -> None:
        where = self._where
        if not isinstance(where, (str, os.PathLike)):
            _Writing(where, self._folder, source, budget_nbytes).run()
            return
        storage = open_storage(where, storage_options=options_for(where, self._options))
        try:
            _Writing(storage, self._folder, source, budget_nbytes).run()
        finally:
            storage.close()


@dataclass(slots=True)
class _Writing:
    """One write."""

    storage: Storage
    folder: str
    source: TensorSource
    budget_nbytes: int
    values: dict[str, Payload] = field(default_factory=dict)
    """By DCP's name."""
    chunks: dict[str, tuple[StoredChunk, ...]] = field(default_factory=dict)
    """By the source's name of a tensor."""
    files: list[str] = field(default_factory=lambda: ["__0_0.distcp"])
    """The last is being written; it has `at` bytes so far."""
    at: int = 0

    @property
    def url(self) -> str:
        return f"{self.storage.url.rstrip('/')}/{self.folder}".rstrip("/")

    def run(self) -> None:
        leaves = self._leaves()
        try:
            if self.storage.list(self.folder):
                raise CheckpointSaveError(f"{self.url} is not empty: give a folder that is not there yet")
            self._all(leaves)
        except OSError as error:
            raise CheckpointSaveError(f"{self.url} was not written: {error}") from error

    def _all(self, leaves: Mapping[str, tuple[Keys, Any]]) -> None:
        put: list[str] = []
        """What is there by now and is ours: a name that another has taken meanwhile is not."""
        try:
            for file, parts in self._files(leaves):
                self.storage.put(self._key(file), parts)
                put.append(file)
            paths = {name: path for name, (path, _) in leaves.items()}
            content = encode_dcp_metadata(DcpMetadata(self._entries(leaves), paths), checkpoint_id=self.url)
            put.insert(0, METADATA)  # from here on: its answer may be lost
            self.storage.put(self._key(METADATA), [content])
        except BaseException:
            with suppress(OSError):
                self.storage.delete([self._key(file) for file in put])
            raise

    def _key(self, file: str) -> str:
        return f"{self.folder}/{file}" if self.folder else file

    def _leaves(self) -> dict[str, tuple[Keys, Any]]:
        """By DCP's name, the keys and the leaf, which is a `TensorName` or any value."""
        leaves: dict[str, tuple[Keys, Any]] = {}
        for keys, leaf in _flat(self.source.tree, ()):
            name = ".".join(map(str, keys))
            if name in leaves:
                raise InvalidStateError(f"{name}: two keys of the state have this name in DCP, {leaves[name][0]} too")
            leaves[name] = keys, leaf
        return leaves

    def _files(self, leaves: Mapping[str, tuple[Keys, Any]]) -> Iterator[tuple[str, Iterator[Buffer]]]:
        """Files with their content: values first, as DCP does; then tensors in the source's order, and each once."""
        wanted = {self._base(leaf.name): None for _, leaf in leaves.values() if type(leaf) is TensorName}
        parts = self._parts(leaves, [name for name in self.source.tensors if name in wanted])
        first = next(parts, None)
        while first is not None:
            yield self.files[-1], self._of_file(first, parts)
            first = next(parts, None)

    def _entries(self, leaves: Mapping[str, tuple[Keys, Any]]) -> dict[str, Entry]:
        """By DCP's name, when all is written."""
        entries: dict[str, Entry] = {}
        for name, (_, leaf) in leaves.items():
            if type(leaf) is TensorName:
                facts = self.source.tensors[self._base(leaf.name)]
                entries[name] = StoredTensor(facts.dtype, facts.shape, self.chunks[self._base(leaf.name)])
            else:
                entries[name] = self.values[name]
        return entries

    def _of_file(self, first: Sequence[Buffer], rest: Iterator[Sequence[Buffer]]) -> Iterator[Buffer]:
        yield from first
        while self.at < _FILE_NBYTES and (more := next(rest, None)) is not None:
            yield from more

    def _parts(self, leaves: Mapping[str, tuple[Keys, Any]], names: Sequence[str]) -> Iterator[Sequence[Buffer]]:
        """The archives, one by one; where each will lie is noted before it is handed out."""
        for name, (_, leaf) in leaves.items():
            if type(leaf) is not TensorName:
                archive = self._value(name, leaf)
                self.values[name] = self._noted(archive)
                yield archive
        for name in names:
            facts, chunks = self.source.tensors[name], []
            most = max(self.budget_nbytes // _SHARE // ITEMSIZE[facts.dtype], 1)
            for block in _cut(facts.shape, most):
                archive = self._chunk(name, block)
                chunks.append(StoredChunk(block.offsets, block.lengths, self._noted(archive)))
                yield archive
            self.chunks[name] = tuple(chunks)

    def _noted(self, archive: Sequence[memoryview]) -> Payload:
        """Where it will lie: behind the one before, or in a new file."""
        if self.at >= _FILE_NBYTES:
            self.files.append(f"__0_{len(self.files)}.distcp")
            self.at = 0
        payload = Payload(self.files[-1], self.at, sum(map(len, archive)))
        self.at += payload.nbytes
        return payload

    def _base(self, name: str) -> str:
        return self.source.ties.get(name, name)

    def _chunk(self, name: str, block: Block) -> list[memoryview]:
        facts = self.source.tensors[name]
        start = position(facts.shape, block.offsets) * ITEMSIZE[facts.dtype]
        data = self._data(name, start, block.numel * ITEMSIZE[facts.dtype])
        content = Content(name, facts.dtype, block.lengths, data)
        return archive_of(TensorRef(0, getattr(torch, facts.dtype), block.lengths), [content])

    def _value(self, name: str, value: Any) -> list[memoryview]:
        """A value as one archive, with the tensors in it: these are in memory as long as it is being written."""
        contents: list[Content] = []

        def hold(leaf: TensorName) -> TensorRef:
            base = self._base(leaf.name)
            facts = self.source.tensors[base]
            contents.append(Content(base, facts.dtype, facts.shape, self._data(base, 0, facts.nbytes)))
            return TensorRef(len(contents) - 1, getattr(torch, facts.dtype), facts.shape)

        try:
            check_value(_mapped(value, lambda _: None))
            return archive_of(_mapped(value, hold), contents)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a value's own `__reduce__` raises
            raise InvalidStateError(f"{name} cannot be stored: {error}") from error

    def _data(self, name: str, start: int, nbytes: int) -> memoryview:
        data = memoryview(bytearray(nbytes))
        if nbytes:
            self.source.read([Window(name, start, data)])
        return data


def _flat(node: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    """What DCP's `flatten_state_dict` would find, and containers with nothing in them, which it loses."""
    if len(keys) > MAX_LEVELS:
        raise InvalidStateError(f"{keys[0]}: more than {MAX_LEVELS} containers within each other")
    if isinstance(node, Mapping) and (node or not keys):
        for key, below in node.items():
            yield from _flat(below, (*keys, str(key)))
    elif isinstance(node, list) and _is_entered(node):
        for number, below in enumerate(node):
            yield from _flat(below, (*keys, number))
    else:
        yield keys, node


def _is_entered(items: Sequence[Any]) -> bool:
    """Whether there is a tensor in a list, or a mapping."""
    return any(
        isinstance(item, (TensorName, Mapping)) or (isinstance(item, list) and _is_entered(item)) for item in items
    )


def _mapped(node: Any, hold: Any) -> Any:
    if type(node) is TensorName:
        return hold(node)
    if type(node) in (list, tuple):
        return type(node)([_mapped(item, hold) for item in node])
    if type(node) is dict:
        return {key: _mapped(item, hold) for key, item in node.items()}
    return node


def _cut(shape: tuple[int, ...], most: int) -> Iterator[Block]:
    """Blocks of at most so many elements that are one run of memory each; none of a tensor without elements."""
    if not math.prod(shape):
        return
    if not shape:
        yield Block((), ())
        return
    inner, below = math.prod(shape[1:]), shape[1:]
    if inner <= most:
        rows = most // inner
        for row in range(0, shape[0], rows):
            yield Block((row,) + (0,) * len(below), (min(rows, shape[0] - row), *below))
        return
    for row in range(shape[0]):
        for block in _cut(below, most):
            yield Block((row, *block.offsets), (1, *block.lengths))
