"""Fragments: boxes of whole tensors as they lie in this rank's live memory, their bytes and their checksums.

A fragment is never copied as a whole. Contiguous memory of the host is handed out as it is; all else (another device,
strange strides) goes through pieces of at most `WINDOW` bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from shardckpt.engine.consolidated.blocks import Block, Shape, stretch
from shardckpt.engine.loading.integrity import Region, Runs, linear_sum, runs_of, zero_crc
from shardckpt.format.checksum import crc32, crc32_combine
from shardckpt.format.index import ITEMSIZE, StoredRecord

WINDOW = 2 << 20
"""Bytes of a piece of memory through which tensors go."""

_SHORT = 8 << 10
"""Below this distance in bytes, runs of a record are summed with the gaps between them, as zeros: joining the sums of
two runs costs 2.5 us, summing up 8 KiB a third of that (2026-11)."""

_SPAN = 1 << 20
"""Bytes that are summed up together with their gaps."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Fragment:
    """A box of the tensor `name` (of `dtype` and, as a whole, of `shape`): `tensor` is a view of live memory."""

    name: str
    dtype: str
    shape: Shape
    offsets: Shape
    tensor: torch.Tensor

    @property
    def block(self) -> Block:
        return Block(self.offsets, tuple(self.tensor.shape))

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * ITEMSIZE[self.dtype]


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same width, for which torch has every operation; bits stay what they are."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.view(_WORDS[plain.element_size()]) if plain.element_size() in _WORDS else plain


def is_direct(tensor: torch.Tensor) -> bool:
    """Whether its memory is, as it is, what is to be stored."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def contents(fragment: Fragment) -> Iterator[memoryview]:
    """The bytes of a fragment in row-major order: its own memory, or one piece after the other."""
    return contents_of(fragment.tensor, 0, fragment.nbytes)


def contents_of(tensor: torch.Tensor, first: int, last: int) -> Iterator[memoryview]:
    """Bytes `first` to `last` of a tensor, whole elements, in row-major order: of its own memory, or piece by piece."""
    if first >= last:
        return
    if is_direct(tensor):
        yield _bytes_of(tensor)[first:last]
        return
    size = tensor.element_size()
    for _, piece in _pieces(tensor, WINDOW // size, first // size, last // size):
        yield _bytes_of(piece)


def sum_of(fragment: Fragment) -> int:
    """L of the whole tensor with zeros where the fragment is not (see `loading.integrity`).

    The sums of fragments that make up a tensor, xored, are L of the tensor: so its CRC is known to whoever has the
    sums, before anybody has seen all of its bytes.
    """
    numel, itemsize = math.prod(fragment.shape), ITEMSIZE[fragment.dtype]
    record = StoredRecord(fragment.dtype, fragment.shape, 0, numel * itemsize, 0)
    total = 0
    for block, piece in _pieces(fragment.tensor, _step(fragment)):
        here = block.moved(fragment.offsets)
        runs = runs_of(record, Region(here.offsets, here.lengths))
        if len(runs.offsets) > 1 and runs.span <= min(len(runs.offsets) * _SHORT, 4 * _SPAN):
            total ^= _sum_with_gaps(record, runs, piece)
        else:
            content = _bytes_of(piece)
            cuts = (content[at : at + runs.nbytes] for at in range(0, len(content), runs.nbytes))
            total ^= linear_sum(record.nbytes, runs, cuts)
    return total


def _step(fragment: Fragment) -> int:
    """Elements of a piece; where runs are short, so few that what they span of the whole tensor is not much."""
    itemsize = ITEMSIZE[fragment.dtype]
    cut = [d for d, (n, size) in enumerate(zip(fragment.tensor.shape, fragment.shape, strict=True)) if n != size]
    if not cut or cut[-1] == 0:
        return WINDOW // itemsize
    own, whole = (math.prod(shape[cut[-1] :]) for shape in (fragment.tensor.shape, fragment.shape))
    return max(1, _SPAN // itemsize * own // whole) if whole * itemsize <= _SHORT else WINDOW // itemsize


def _sum_with_gaps(record: StoredRecord, runs: Runs, piece: torch.Tensor) -> int:
    """The runs at their places among zeros, summed up in one go."""
    source = words(piece)
    spread = torch.zeros(runs.span // source.element_size(), dtype=source.dtype)
    strides = [math.prod(record.shape[d + 1 :]) for d in range(len(record.shape))]
    spread.as_strided(tuple(piece.shape), strides).copy_(source)
    total = crc32(_bytes_of(spread)) ^ zero_crc(runs.span)
    return int(crc32_combine(total, 0, record.nbytes - runs.offsets[0] - runs.span))


def _pieces(
    tensor: torch.Tensor, numel: int, first: int = 0, last: int | None = None
) -> Iterable[tuple[Block, torch.Tensor]]:
    shape, last = tuple(tensor.shape), tensor.numel() if last is None else last
    for start in range(first, last, numel):
        for block in stretch(shape, start, min(start + numel, last)):
            yield block, tensor[block.slices]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Row-major; of a direct tensor its own memory."""
    flat = words(tensor).cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy().data)


def word_type(itemsize: int) -> torch.dtype:
    """The dtype of `words` of elements of that many bytes."""
    return _WORDS.get(itemsize, torch.complex128)
