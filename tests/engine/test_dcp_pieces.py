"""Tensors that lie in explicit pieces: which pieces make up a tensor, and records that lie about it."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.loading.sources import Sources
from shardckpt.format.manifest import (
    FileEntry,
    LayoutEntry,
    Manifest,
    Table,
    TensorEntry,
    decode_manifest,
    encode_manifest,
)
from shardckpt.format.placement import Box, Piece, is_tiling


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Piece]]:
    """A shape of up to three dimensions, cut again and again at random."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    pieces = [Piece(0, (0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        number = draw(st.integers(0, len(pieces) - 1))
        rank, offsets, lengths = pieces[number]
        wide = [d for d, length in enumerate(lengths) if length > 1]
        if wide:
            d = draw(st.sampled_from(wide))
            at = draw(st.integers(1, lengths[d] - 1))
            low = (*lengths[:d], at, *lengths[d + 1 :])
            high = (*lengths[:d], lengths[d] - at, *lengths[d + 1 :])
            second = (*offsets[:d], offsets[d] + at, *offsets[d + 1 :])
            pieces[number : number + 1] = [Piece(rank, offsets, low), Piece(rank + 1, second, high)]
    return shape, draw(st.permutations(pieces))


def covers(shape: tuple[int, ...], pieces: list[Piece]) -> torch.Tensor:
    """How many pieces cover each element."""
    count = torch.zeros(shape, dtype=torch.int32)
    for piece in pieces:
        count[tuple(slice(a, a + n) for a, n in zip(piece.offsets, piece.lengths, strict=True))] += 1
    return count


@given(tilings())
def test_a_tensor_that_was_cut_up_is_a_tiling(made: tuple[tuple[int, ...], list[Piece]]) -> None:
    assert is_tiling(*made)


@given(tilings(), st.data())
def test_what_covers_not_every_element_once_is_none(
    made: tuple[tuple[int, ...], list[Piece]], data: st.DataObject
) -> None:
    shape, pieces = made
    wrong = list(pieces)
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(wrong) - 1))
        other = data.draw(st.sampled_from(pieces))
        wrong[number : number + data.draw(st.integers(0, 1))] = [other] * data.draw(st.integers(0, 2))
        if not wrong:
            break
    assert is_tiling(shape, wrong) == bool((covers(shape, wrong) == 1).all())


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece(0, (0, 0), (4, 4)), Piece(0, (2, 0), (4, 4))],  # sum of volumes right, two rows twice, two not at all
        [Piece(0, (0, 0), (3, 4)), Piece(0, (0, 0), (5, 4))],
        [Piece(0, (0, 0), (8, 4)), Piece(0, (8, 0), (0, 4))],
        [Piece(0, (0,), (8,))],
        [Piece(0, (0, 0), (8, 5))],
        [Piece(0, (-1, 0), (8, 4))],
        [],
    ],
)
def test_pieces_that_do_not_make_up_8_by_4(pieces: list[Piece]) -> None:
    assert not is_tiling((8, 4), pieces)


def test_a_tensor_without_dimensions_is_one_piece() -> None:
    assert is_tiling((), [Piece(3, (), ())])
    assert not is_tiling((), [Piece(3, (), ()), Piece(4, (), ())])


def record() -> Manifest:
    layouts = (
        LayoutEntry("rank", pieces=(Piece(0, (0, 0), (3, 4)), Piece(1, (3, 0), (5, 4)))),
        LayoutEntry("rank", pieces=(Piece(1, (0,), (2,)),)),
    )
    tensors = {
        "w": TensorEntry("float32", (8, 4), 0),
        "b": TensorEntry("int64", (2,), 1),
        "m": TensorEntry("bfloat16", (8, 4), 0),
    }
    files = tuple(FileEntry(f"rank_{r}.pt", 1000, 0, "rank", r, (100, 10, 0), (200, 10, 0)) for r in range(2))
    return Manifest(
        step=3,
        attempt="0123456789abcdef",
        created="2026-11-22T00:00:00+00:00",
        shard_of=(0, 0),
        files=files,
        layouts=layouts,
        tables=(Table((0, 1), tensors, {"lr": "rank"}),),
    )


def test_the_record_keeps_them() -> None:
    assert decode_manifest(encode_manifest(record())) == record()


def test_tensors_that_lie_alike_share_one_list() -> None:
    """A record must not grow with tensors times ranks."""
    ranks = 64
    pieces = tuple(Piece(rank, (rank,), (1,)) for rank in range(ranks))
    tensors = {f"layers.{i}.weight": TensorEntry("float32", (ranks,), 0) for i in range(1000)}
    wide = replace(
        record(),
        shard_of=(0,) * ranks,
        layouts=(LayoutEntry("rank", pieces=pieces),),
        tables=(Table(tuple(range(ranks)), tensors, {}),),
    )
    assert len(encode_manifest(wide)) < 60_000


def test_a_loader_finds_them_in_the_files_of_those_that_wrote() -> None:
    sources = Sources(record(), Coordinates(0, 1, 0, 1, (0,)))
    assert sources.chunks("w", "fail") == [
        ("rank_0.pt", Box((0, 0), (3, 4), (0, 0))),
        ("rank_1.pt", Box((3, 0), (5, 4), (0, 0))),
    ]
    assert sources.chunks("b", "fail") == [("rank_1.pt", Box((0,), (2,), (0,)))]
    assert sources.trees_of(0) == ["rank_0.pt", "rank_1.pt"], "rank 0 held b, which lies in the tree of rank 1"
    assert sources.trees_of(1) == ["rank_1.pt"]


LIES: dict[str, Callable[[Any], Any]] = {
    "a rank that there is not": lambda pieces: pieces[0].__setitem__(0, 2),
    "a negative offset": lambda pieces: pieces[0][1].__setitem__(0, -1),
    "beyond the tensor": lambda pieces: pieces[1][2].__setitem__(0, 6),
    "a gap": lambda pieces: pieces.pop(),
    "twice the same": lambda pieces: pieces.append(pieces[0]),
    "too few dimensions": lambda pieces: pieces[0][1].pop(),
    "no list": lambda pieces: pieces.__setitem__(0, {"rank": 0}),
    "too short": lambda pieces: pieces[0].pop(),
    "too long": lambda pieces: pieces[0].append(1),
    "a text": lambda pieces: pieces[0].__setitem__(2, "34"),
    "a fraction": lambda pieces: pieces[0][2].__setitem__(0, 3.0),
    "a truth value": lambda pieces: pieces[0].__setitem__(0, True),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_record_that_lies_about_pieces_is_refused(lie: Callable[[Any], Any]) -> None:
    content = json.loads(encode_manifest(record()))
    lie(content["layouts"][0]["pieces"])
    with pytest.raises(ValueError, match=r"piece|size|sizes|well-formed|unpack"):
        decode_manifest(signed(content))


def test_pieces_lie_on_no_mesh_and_in_no_shared_file() -> None:
    content = json.loads(encode_manifest(record()))
    content["layouts"][0]["home"] = "model"
    with pytest.raises(ValueError, match="in the files of ranks"):
        decode_manifest(signed(content))


def test_more_corners_than_can_be_counted_are_refused_at_once() -> None:
    pieces = [Piece(0, corner, (1,) * 40) for corner in itertools.islice(itertools.product((0, 1), repeat=40), 8)]
    assert math.prod((2,) * 40) > 1 << 39
    assert not is_tiling((2,) * 40, pieces)


def signed(content: Any) -> bytes:
    """A record with a digest that agrees, as somebody who means harm would make it."""
    content.pop("sha256")
    lines = ",\n".join(f'"{key}": {json.dumps(value, separators=(",", ":"))}' for key, value in content.items())
    body = f"{{\n{lines},\n"
    return f'{body}"sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()
