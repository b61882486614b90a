"""Sums of fragments make up the CRC of the whole tensor; contents are their bytes, whatever their memory looks like."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.engine.consolidated import fragments
from shardckpt.engine.consolidated.fragments import Fragment, contents, is_direct, sum_of, words
from shardckpt.engine.loading.integrity import zero_crc
from shardckpt.format.checksum import crc32
from shardckpt.format.index import ITEMSIZE

DTYPES = [name for name in ITEMSIZE if hasattr(torch, name)]


def random_tensor(shape: tuple[int, ...], dtype: str, seed: int = 0) -> torch.Tensor:
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (nbytes,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(getattr(torch, dtype)).view(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """In row-major order."""
    return words(tensor).contiguous().flatten().view(torch.uint8).numpy().tobytes()


def split(
    offsets: tuple[int, ...], tensor: torch.Tensor, draw: st.DrawFn
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """A tensor, cut in two, and in two again."""
    cuts = [d for d, size in enumerate(tensor.shape) if size > 1]
    if not cuts or draw(st.integers(0, 2)) == 0:
        yield offsets, tensor
        return
    dim = draw(st.sampled_from(cuts))
    at = draw(st.integers(1, tensor.shape[dim] - 1))
    yield from split(offsets, tensor.narrow(dim, 0, at), draw)
    second = tuple(o + at * (d == dim) for d, o in enumerate(offsets))
    yield from split(second, tensor.narrow(dim, at, tensor.shape[dim] - at), draw)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_sums_of_any_cut_make_the_crc(data):
    """With pieces of a few bytes, summed with and without the gaps between them."""
    shape = data.draw(st.lists(st.integers(1, 7), max_size=4).map(tuple))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensor = random_tensor(shape, dtype, data.draw(st.integers(0, 9)))
    with pytest.MonkeyPatch.context() as patch:
        for name, choice in (("WINDOW", [16, 64, 1 << 20]), ("_SPAN", [16, 256]), ("_SHORT", [0, 64, 8192])):
            patch.setattr(fragments, name, data.draw(st.sampled_from(choice)))
        total = 0
        for offsets, part in split((0,) * len(shape), tensor, data.draw):
            held = part if data.draw(st.booleans()) else part.clone()
            fragment = Fragment("x", dtype, shape, offsets, held)
            total ^= sum_of(fragment)
            assert b"".join(contents(fragment)) == bytes_of(part)
    assert total ^ zero_crc(tensor.numel() * tensor.element_size()) == crc32(bytes_of(tensor))


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_sums_of_large_parts(cut):
    shape = (130, 3001, 5)
    tensor = random_tensor(shape, "float32")
    parts = torch.tensor_split(tensor, 3, dim=cut)
    starts = [sum(part.shape[cut] for part in parts[:i]) for i in range(3)]
    offsets = [tuple(start * (d == cut) for d in range(3)) for start in starts]
    sums = [sum_of(Fragment("x", "float32", shape, at, p)) for at, p in zip(offsets, parts, strict=True)]
    joined = functools.reduce(int.__xor__, sums)
    assert joined ^ zero_crc(tensor.numel() * 4) == crc32(bytes_of(tensor))


def test_contiguous_memory_is_handed_out_as_it_is():
    tensor = torch.arange(12.0).view(3, 4)
    (view,) = contents(Fragment("x", "float32", (3, 4), (0, 0), tensor))
    tensor[1, 1] = 77
    assert bytes(view) == bytes_of(tensor)
    assert is_direct(tensor)
    assert not is_direct(tensor.t())


def test_copies_are_made_piece_by_piece(monkeypatch):
    monkeypatch.setattr(fragments, "WINDOW", 64)
    tensor = random_tensor((40, 30), "int16")
    pieces = list(contents(Fragment("x", "int16", (30, 40), (0, 0), tensor.t())))
    assert max(map(len, pieces)) <= 64
    assert b"".join(pieces) == bytes_of(tensor.t())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_conjugates_are_what_they_stand_for(dtype):
    tensor = torch.tensor([1 + 2j, 3 - 4j], dtype=dtype)
    for lazy in (tensor.conj(), tensor.conj().imag):
        name = str(lazy.dtype).removeprefix("torch.")
        fragment = Fragment("x", name, (2,), (0,), lazy)
        assert not is_direct(lazy)
        expected = (lazy.resolve_conj().resolve_neg() + 0).contiguous().view(torch.uint8).numpy().tobytes()
        assert b"".join(contents(fragment)) == expected
        assert sum_of(fragment) ^ zero_crc(len(expected)) == crc32(expected)
