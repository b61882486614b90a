"""From inventories and sums to whole tensors: who writes what, in which order, and what does not fit together."""

from __future__ import annotations

import re
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardckpt as sc
from shardckpt.engine.consolidated.assembling.whole import Kind, Whole, WholeTensor
from shardckpt.engine.consolidated.blocks import Block
from shardckpt.engine.consolidated.holding import FlatPiece
from shardckpt.engine.consolidated.inventory import Inventory, Replicas, natural
from shardckpt.engine.loading.integrity import zero_crc
from shardckpt.format.manifest import LayoutEntry, MeshEntry, TensorEntry

MESH = MeshEntry(("replicate", "shard"), (2, 2), (0, 1, 2, 3))
ROWS = LayoutEntry("rank", 0, ("R", "S(0)"))
PLAIN = LayoutEntry("model")


def inventory(**tensors: TensorEntry) -> Inventory:
    return Inventory((MESH,), (ROWS, PLAIN), {name.replace("_", "."): entry for name, entry in tensors.items()})


def entry(rows: int, *, layout: int = 0, replica: int = 0, dtype: str = "int8") -> TensorEntry:
    return TensorEntry(dtype, (rows, 3), layout, replica)


def put_together(kinds: list[Kind], sums: list[list[int]], flat: dict[int, list[FlatPiece]] | None = None):
    whole = Whole(kinds, [(flat or {}).get(rank, []) for rank in range(len(sums))])
    return list(whole.tensors([array("I", own) for own in sums]))


@given(st.lists(st.text("ab.01239", max_size=8), unique=True))
def test_any_names_have_an_order(names):
    ordered = sorted(names, key=natural)
    names.reverse()
    assert sorted(names, key=natural) == ordered


def test_the_order_is_that_of_people():
    names = ["layers.10.w", "layers.2.w", "layers.2", "layers", "layers.02.w", "head", "layers.2.b"]
    expected = ["head", "layers", "layers.2", "layers.2.b", "layers.02.w", "layers.2.w", "layers.10.w"]
    assert sorted(names, key=natural) == expected


def test_fragments_follow_each_other_in_the_files():
    """Rows over two pairs of ranks; of each tensor one pair writes."""
    held = inventory(w_10=entry(4), w_2=entry(6, replica=1), b=entry(1, layout=1))
    kinds = [Kind(held, (0, 1, 2, 3))]
    b, w2, w10 = put_together(kinds, [[7, 1], [2], [3], [4]])
    assert [tensor.name for tensor in (b, w2, w10)] == ["b", "w.2", "w.10"]
    assert b.sources[0].rank == 0
    assert [(s.rank, s.at, s.block) for s in w2.sources] == [
        (2, 0, Block((0, 0), (3, 3))),
        (3, 0, Block((3, 0), (3, 3))),
    ]
    assert [(s.rank, s.at, s.block) for s in w10.sources] == [
        (0, 3, Block((0, 0), (2, 3))),
        (1, 0, Block((2, 0), (2, 3))),
    ]
    assert w10.crc == 1 ^ 2 ^ zero_crc(12)
    assert w2.crc == 3 ^ 4 ^ zero_crc(18)


def test_replicas_share_the_work():
    replicas = Replicas()
    chosen = [replicas.choose(ROWS, 3, nbytes) for nbytes in (10, 4, 4, 5, 1, 1)]
    assert chosen == [0, 1, 2, 1, 2, 2]
    assert replicas.choose(PLAIN, 3, 1) == 0


def test_inventories_travel():
    held = inventory(w=entry(4), b=entry(1, layout=1))
    back = Inventory.decode(held.encode())
    assert back == held
    assert back.digest == held.digest
    assert back.digest != inventory(w=entry(5), b=entry(1, layout=1)).digest


def test_two_kinds_that_hold_the_same_tensor():
    """The same placements, or plain copies: fragments of either count, and copies are compared."""
    kinds = [Kind(inventory(w=entry(2)), (0,)), Kind(inventory(w=entry(2), x=entry(1, layout=1)), (1, 2, 3))]
    w, x = put_together(kinds, [[5], [6, 9], [], []])
    assert [source.rank for source in w.sources] == [0, 1]
    assert x.sources[0].rank == 1
    copies = [Kind(inventory(b=entry(1, layout=1), **{f"own{n}": entry(0, layout=1)}), (n,)) for n in range(2)]
    (b, *empty) = put_together(copies, [[4], [4]])
    assert [source.rank for source in b.sources] == [0]
    assert all(not tensor.sources and tensor.crc == 0 for tensor in empty)
    with pytest.raises(sc.InvalidStateError, match="ranks 0 and 1 hold different values of b,"):
        put_together(copies, [[4], [5]])


def piece(offset: int, length: int, holders: str = "fsdp 0", **options) -> FlatPiece:
    return FlatPiece("f", options.get("dtype", "int8"), options.get("shape", (10,)), holders, (offset,), (length,))


def test_flat_pieces():
    kinds = [Kind(inventory(), (0, 1))]
    (f,) = put_together(kinds, [[1], [2, 3]], {0: [piece(6, 4)], 1: [piece(0, 5), piece(5, 1)]})
    assert [(s.rank, s.at, s.block) for s in f.sources] == [
        (1, 0, Block((0,), (5,))),
        (1, 5, Block((5,), (1,))),
        (0, 0, Block((6,), (4,))),
    ]
    assert f.crc == 1 ^ 2 ^ 3 ^ zero_crc(10)


@pytest.mark.parametrize(
    ("flat", "sums", "said"),
    [
        ({0: [piece(0, 4)], 1: [piece(5, 5)]}, [[1], [2]], "f cannot be made whole: .* 9 of its 10 elements"),
        ({0: [piece(0, 5)], 1: [piece(5, 5, "fsdp 1")]}, [[1], [2]], "hold 5 of its 10 elements"),
        ({0: [piece(0, 10)], 1: [piece(0, 10)]}, [[1], [2]], "ranks 0 and 1 hold different values of f"),
        ({0: [piece(0, 10)], 1: [piece(0, 10, "fsdp 1")]}, [[1], [2]], "ranks 0 and 1 hold different values of f"),
        ({0: [piece(0, 5)], 1: [piece(5, 5, dtype="uint8")]}, [[1], [2]], r"int8\[10\] and uint8\[10\]"),
        ({0: [piece(0, 10)]}, [[], []], "rank 0 holds other parts"),
        ({0: [piece(0, 10)]}, [[1, 2], []], "rank 0 holds other parts"),
    ],
)
def test_what_does_not_fit_together(flat, sums, said):
    with pytest.raises(sc.InvalidStateError) as caught:
        put_together([Kind(inventory(), (0, 1))], sums, flat)
    assert re.search(said, str(caught.value))


def test_bytes_of_a_whole():
    assert WholeTensor("w", "complex128", (3, 5), 0, ()).nbytes == 240
