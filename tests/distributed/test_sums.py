"""The checksum of a record that no rank reads whole, put together from the pieces that the ranks read."""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.engine.loading.integrity import PartialSum, Region, Runs, join_sums, linear_sum, runs_of, zero_crc
from shardckpt.format.index import ITEMSIZE, StoredRecord

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)
dtypes = st.sampled_from(["uint8", "bfloat16", "float32", "complex128"])


def record_of(shape: tuple[int, ...], dtype: str, content: bytes = b"") -> StoredRecord:
    return StoredRecord(dtype, shape, 4096, math.prod(shape) * ITEMSIZE[dtype], zlib.crc32(content))


def whole(shape: tuple[int, ...]) -> Region:
    return Region((0,) * len(shape), shape)


def elements(shape: tuple[int, ...], region: Region) -> Iterator[int]:
    """The positions of a region's elements in the flat record, one by one."""
    ranges = [range(start, start + length) for start, length in zip(region.start, region.lengths, strict=True)]
    for index in itertools.product(*ranges):
        position = 0
        for at, size in zip(index, shape, strict=True):
            position = position * size + at
        yield position


@st.composite
def regions(draw: st.DrawFn) -> tuple[tuple[int, ...], str, Region]:
    shape, dtype = draw(shapes), draw(dtypes)
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    lengths = tuple(draw(st.integers(1, size - at)) for size, at in zip(shape, start, strict=True))
    return shape, dtype, Region(start, lengths)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], str, list[Region]]:
    """A record cut into disjoint boxes, again and again, as meshes of any kind do."""
    shape, dtype = draw(shapes), draw(dtypes)
    pieces = [whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        number = draw(st.integers(0, len(pieces) - 1))
        piece = pieces[number]
        dims = [d for d, length in enumerate(piece.lengths) if length > 1]
        if dims:
            dim = draw(st.sampled_from(dims))
            pieces[number : number + 1] = cut(piece, dim, draw(st.integers(1, piece.lengths[dim] - 1)))
    return shape, dtype, pieces


def cut(piece: Region, dim: int, at: int) -> list[Region]:
    def resized(start: int, length: int) -> Region:
        starts, lengths = list(piece.start), list(piece.lengths)
        starts[dim], lengths[dim] = start, length
        return Region(tuple(starts), tuple(lengths))

    begin, length = piece.start[dim], piece.lengths[dim]
    return [resized(begin, at), resized(begin + at, length - at)]


def pieces_of(content: bytes, runs: Runs) -> list[memoryview]:
    return [memoryview(content)[at : at + runs.nbytes] for at in runs.offsets]


def sum_of(
    content: bytes, record: StoredRecord, region: Region, *, file: str = "rank_0.pt", tensor: str = "w"
) -> PartialSum:
    """What a rank that has read this region of these bytes sends."""
    runs = runs_of(record, region)
    total = linear_sum(record.nbytes, runs, pieces_of(content, runs))
    return PartialSum(file, 0, tensor, record.shape, region, runs.total, record.nbytes, record.crc, total)


@given(regions())
def test_runs_are_the_bytes_of_the_region_in_order(given_region):
    shape, dtype, region = given_region
    size = ITEMSIZE[dtype]
    runs = runs_of(record_of(shape, dtype), region)
    read = [byte for at in runs.offsets for byte in range(at, at + runs.nbytes)]
    assert read == [element * size + i for element in elements(shape, region) for i in range(size)]
    assert runs.total == len(read)
    assert runs.span == read[-1] + 1 - read[0]


@pytest.mark.parametrize(
    ("region", "offsets", "nbytes"),
    [
        (Region((0, 0, 0), (4, 5, 6)), (0,), 480),
        (Region((1, 0, 0), (2, 5, 6)), (120,), 240),
        (Region((1, 2, 0), (1, 2, 6)), (168,), 48),
        (Region((1, 2, 0), (2, 2, 6)), (168, 288), 48),
        (Region((0, 0, 1), (1, 2, 3)), (4, 28), 12),
    ],
    ids=["whole", "rows", "part of one row", "parts of rows", "columns"],
)
def test_runs_are_as_long_as_they_can_be(region, offsets, nbytes):
    """Each run is a read of its own, so that rows that lie one after the other must be one."""
    assert runs_of(record_of((4, 5, 6), "float32"), region) == Runs(offsets, nbytes)


@given(st.integers(0, 1 << 18))
def test_the_crc_of_zeros(nbytes):
    assert zero_crc(nbytes) == zlib.crc32(bytes(nbytes))


@given(regions(), st.randoms(use_true_random=False))
def test_a_linear_sum_is_that_of_the_bytes_among_zeros(given_region, rng):
    shape, dtype, region = given_region
    record = record_of(shape, dtype)
    content, masked = rng.randbytes(record.nbytes), bytearray(record.nbytes)
    runs = runs_of(record, region)
    for at in runs.offsets:
        masked[at : at + runs.nbytes] = content[at : at + runs.nbytes]
    expected = zlib.crc32(masked) ^ zlib.crc32(bytes(record.nbytes))
    assert linear_sum(record.nbytes, runs, pieces_of(content, runs)) == expected


@given(partitions(), st.randoms(use_true_random=False), st.integers(1, 3))
def test_the_sums_of_all_pieces_are_the_sum_of_the_record(partition, rng, copies):
    """In any order, and with pieces that several ranks have read; then again with one byte flipped."""
    shape, dtype, pieces = partition
    nbytes = record_of(shape, dtype).nbytes
    content = rng.randbytes(nbytes)
    record = record_of(shape, dtype, content)
    sums = [sum_of(content, record, piece) for piece in pieces for _ in range(rng.randint(1, copies))]
    rng.shuffle(sums)
    assert join_sums(sums) == ([], 0)
    damaged = flipped(content, rng)
    assert join_sums(sum_of(damaged, record, piece) for piece in pieces) == (["rank_0.pt"], 0)


@given(partitions(), st.randoms(use_true_random=False))
def test_a_piece_that_is_missing_leaves_the_rest_unchecked(partition, rng):
    """Neither found good nor found damaged: it is counted."""
    shape, dtype, pieces = partition
    content = rng.randbytes(record_of(shape, dtype).nbytes)
    record = record_of(shape, dtype, rng.randbytes(7))  # a CRC that is not that of the content
    present = [sum_of(content, record, piece) for piece in pieces[1:]]
    assert join_sums(present) == ([], sum(item.nbytes for item in present))


@given(partitions(), st.randoms(use_true_random=False))
def test_two_ranks_that_read_different_bytes_of_one_piece(partition, rng):
    """Even if the others' pieces are not known: one of the two has read what was not written."""
    shape, dtype, pieces = partition
    content = rng.randbytes(record_of(shape, dtype).nbytes)
    record = record_of(shape, dtype, content)
    runs = runs_of(record, pieces[0])
    spoilt = bytearray(content)
    spoilt[rng.choice(runs.offsets) + rng.randrange(runs.nbytes)] ^= 1 << rng.randrange(8)
    both = [sum_of(content, record, pieces[0]), sum_of(bytes(spoilt), record, pieces[0])]
    assert join_sums(both)[0] == ["rank_0.pt"]


def test_records_are_told_apart():
    good, bad = b"a" * 64, b"b" * 64
    record = record_of((8, 8), "uint8", good)
    halves = [Region((0, 0), (4, 8)), Region((4, 0), (4, 8))]
    sums = [sum_of(good, record, half, file="rank_1.pt") for half in halves]
    sums += [sum_of(bad, record, half, file="model.0.pt") for half in halves]
    assert join_sums(sums) == (["model.0.pt"], 0)


def test_overlapping_pieces_prove_nothing():
    """Together as many bytes as the record has, but not its bytes: that is no proof of damage."""
    content = bytes(range(16))
    record = record_of((4, 4), "uint8", content)
    overlapping = [sum_of(content, record, Region((0, 0), (2, 4))), sum_of(content, record, Region((0, 0), (4, 2)))]
    assert join_sums(overlapping) == ([], 16)


@pytest.mark.parametrize("content", [bytes(range(16)), bytes(16)], ids=["as written", "damaged"])
def test_tied_tensors_may_be_cut_in_different_ways(content):
    record = record_of((4, 4), "uint8", bytes(range(16)))
    rows = [sum_of(content, record, Region((at, 0), (2, 4)), tensor="embed") for at in (0, 2)]
    columns = [sum_of(content, record, Region((0, at), (4, 1)), tensor="head") for at in range(4)]
    assert join_sums(rows + columns) == ([] if any(content) else ["rank_0.pt"], 0)


@given(regions(), st.randoms(use_true_random=False))
def test_a_sum_travels_as_json(given_region, rng):
    shape, dtype, region = given_region
    content = rng.randbytes(record_of(shape, dtype).nbytes)
    item = sum_of(content, record_of(shape, dtype, content), region)
    assert PartialSum.decode(item.encode()) == item


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)
