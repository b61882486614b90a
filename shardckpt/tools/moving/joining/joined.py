"""The states that several ranks saved, each in a file of its own, as one: shards are joined, copies are taken once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardckpt.engine.consolidated.blocks import Block, common, is_one_run, position, stretch
from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.checksum import value_digest
from shardckpt.format.index import ITEMSIZE
from shardckpt.format.placement import Box, is_tiling
from shardckpt.format.placement import Piece as Tile
from shardckpt.format.restricted.allowed import contiguous_stride
from shardckpt.tools.moving.foreign.archive_source import ArchiveSource
from shardckpt.tools.moving.foreign.reading import check_window
from shardckpt.tools.moving.seam import TensorFacts, TensorName, Window

_COMPARED = 8 << 20
"""Bytes of a copy that are looked at at a time."""


@dataclass(frozen=True, slots=True)
class Extent:
    """What one rank's tensor is of a whole one."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """The file of one rank. `extents`: of its tensors that are parts of whole ones; the others are copies."""

    source: ArchiveSource
    label: str
    extents: Mapping[str, Extent] = field(default_factory=dict)

    @classmethod
    def of(cls, source: ArchiveSource, label: str) -> Share:
        """As its DTensors say."""
        shards = source.shards.items()
        return cls(source, label, {name: Extent(shard.shape, shard.boxes) for name, shard in shards})


@dataclass(frozen=True, slots=True)
class _Piece:
    share: Share
    box: Box
    shape: tuple[int, ...]
    """Of the tensor in the file."""


class JoinedSource:
    """A `TensorSource` of what several ranks saved. Parts that are copies of each other are read once.

    `differ`: the names of tensors and values of which ranks held different ones, and nothing says how they join; those
    of the first rank that has one are shown. Ranks may have different keys, as pipeline stages do. The files are
    closed with it. `CheckpointDamagedError` where the parts of a tensor do not make it up.
    """

    def __init__(self, shares: Sequence[Share], *, where: str) -> None:
        """`where`: the folder, for messages."""
        self._shares, self._where = shares, where
        self._pieces: dict[str, list[_Piece]] = {}
        self._facts: dict[str, TensorFacts] = {}
        self._ties: dict[str, str] = {}
        self.differ: dict[str, str] = {}
        """By name, in whose files."""
        self._tree: Any = None
        for number, share in enumerate(shares):
            self._take(share)
            self._tree = share.source.tree if number == 0 else self._merged(self._tree, share.source.tree, (), share)
        for name, pieces in self._pieces.items():
            self._check_whole(name, pieces)

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return self._facts

    @property
    def ties(self) -> Mapping[str, str]:
        return self._ties

    @property
    def tree(self) -> Any:
        return self._tree

    @property
    def is_sharded(self) -> bool:
        """Whether any tensor is put together of parts."""
        return any(share.extents for share in self._shares)

    def read(self, windows: Sequence[Window]) -> None:
        for window in windows:
            name = self._ties.get(window.name, window.name)
            check_window(window, self._facts[name])
            self._read(Window(name, window.start, window.into.cast("B")))

    def close(self) -> None:
        for share in self._shares:
            share.source.close()

    def _take(self, share: Share) -> None:
        """The tensors of one file, beside those of the files before."""
        facts, ties = share.source.tensors, share.source.ties
        for name in (*facts, *ties):
            own, extent = facts[ties.get(name, name)], share.extents.get(name)
            whole = TensorFacts(own.dtype, own.shape if extent is None else extent.shape)
            tie = ties.get(name)
            if name not in self._facts and name not in self._ties:
                if tie is not None and tie in self._facts and share.extents.get(tie) == extent:
                    self._ties[name] = tie
                    continue
                self._facts[name], self._pieces[name] = whole, []
            elif name in self._ties:
                if tie == self._ties[name]:
                    continue
                self.differ.setdefault(name, share.label)
                continue
            if self._facts[name] != whole:
                self.differ.setdefault(name, share.label)
                continue
            self._add(name, share, extent, own.shape)

    def _add(self, name: str, share: Share, extent: Extent | None, shape: tuple[int, ...]) -> None:
        zeros = (0,) * len(shape)
        boxes = (Box(zeros, shape, zeros),) if extent is None else extent.boxes
        for box in boxes if all(shape) else ():
            place = box.offsets, box.lengths
            copy = next((one for one in self._pieces[name] if (one.box.offsets, one.box.lengths) == place), None)
            if copy is None:
                self._pieces[name].append(_Piece(share, box, shape))
            elif not self._alike(name, copy, share, shape):
                self.differ.setdefault(name, share.label)

    def _alike(self, name: str, held: _Piece, share: Share, shape: tuple[int, ...]) -> bool:
        """Whether a copy is one. Its sum says so, or all of its bytes."""
        one, other = held.share.source, share.source
        if one.sum_of(name) == other.sum_of(name):
            return True
        if held.shape != shape:
            return False
        nbytes = one.tensors[one.ties.get(name, name)].nbytes
        for at in range(0, nbytes, _COMPARED):
            contents = [bytearray(min(_COMPARED, nbytes - at)) for _ in range(2)]
            for source, into in zip((one, other), contents, strict=True):
                source.read([Window(name, at, memoryview(into))])
            if contents[0] != contents[1]:
                return False
        return True

    def _check_whole(self, name: str, pieces: Sequence[_Piece]) -> None:
        shape = self._facts[name].shape
        if name in self.differ or not all(shape):
            return
        tiles = [Tile(0, piece.box.offsets, piece.box.lengths) for piece in pieces]
        if not is_tiling(shape, tiles):
            has = ", ".join(dict.fromkeys(piece.share.label for piece in pieces)) or "no file"
            raise CheckpointDamagedError(
                f"{self._where} is damaged: the parts of {name} in {has} do not make up {list(shape)}; is the file of "
                "a rank missing?"
            )

    def _merged(self, one: Any, other: Any, path: tuple[Any, ...], share: Share) -> Any:
        """Both trees in one. Tensors are compared elsewhere."""
        if isinstance(one, dict) and isinstance(other, dict):
            both = {key: self._merged(one[key], other[key], (*path, key), share) for key in one if key in other}
            return {**one, **both, **{key: value for key, value in other.items() if key not in one}}
        name = ".".join(map(str, path))
        if isinstance(one, TensorName) and one == other:
            return one
        if type(one) is type(other) and type(one) in (list, tuple) and len(one) == len(other):
            pairs = enumerate(zip(one, other, strict=True))
            return type(one)(self._merged(a, b, (*path, number), share) for number, (a, b) in pairs)
        if isinstance(one, TensorName) or isinstance(other, TensorName) or value_digest(one) != value_digest(other):
            self.differ.setdefault(name, share.label)
        return one

    def _read(self, window: Window) -> None:
        facts = self._facts[window.name]
        size = ITEMSIZE[facts.dtype]
        shape = (*facts.shape, size)  # bytes are a dimension of their own: windows may cut elements
        for block in stretch(shape, window.start, window.start + len(window.into)):
            first = position(shape, block.offsets) - window.start
            place = window.into[first : first + block.numel]
            for piece, here, there in self._in_block(window.name, block, size):
                _copy(window.name, piece, here, place, block, there)

    def _in_block(self, name: str, block: Block, size: int) -> Iterator[tuple[_Piece, Block, Block]]:
        """What the pieces have of a block: where in the file's tensor, and where in the block."""
        for piece in self._pieces[name]:
            whole = Block((*piece.box.offsets, 0), (*piece.box.lengths, size))
            shared = common(block, whole)
            if shared is not None:
                yield piece, shared.inside(whole).moved((*piece.box.local, 0)), shared.inside(block)


def _copy(name: str, piece: _Piece, here: Block, place: memoryview, block: Block, there: Block) -> None:
    """Read a block of the file's tensor, from its first byte to its last, and put it where it belongs."""
    shape = (*piece.shape, _itemsize(piece, name))
    begin = position(shape, here.offsets)
    last = position(shape, [at + n - 1 for at, n in zip(here.offsets, here.lengths, strict=True)])
    if is_one_run(shape, here.lengths) and is_one_run(block.lengths, there.lengths):
        at = position(block.lengths, there.offsets)
        piece.share.source.read([Window(name, begin, place[at : at + here.numel])])
        return
    content = bytearray(last + 1 - begin)
    piece.share.source.read([Window(name, begin, memoryview(content))])
    found = torch.frombuffer(content, dtype=torch.uint8).as_strided(here.lengths, contiguous_stride(shape))
    torch.frombuffer(place, dtype=torch.uint8).view(block.lengths)[there.slices] = found


def _itemsize(piece: _Piece, name: str) -> int:
    source = piece.share.source
    return ITEMSIZE[source.tensors[source.ties.get(name, name)].dtype]
