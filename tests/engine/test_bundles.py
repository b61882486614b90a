"""Receipts that are put together on the way say what they said one by one, and are no longer for there being many."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from shardckpt.engine.committing.bundles import as_bundle, differing, fold_bundles, open_bundles
from shardckpt.engine.committing.receipts import disagreements
from shardckpt.engine.saving.write import Receipt
from shardckpt.format.manifest import FileEntry


def receipt(rank: int, *, plain: int, differ: int = 3) -> Receipt:
    """Of a rank with a file of its own, in which `plain` entries are as on all ranks, and some are not."""
    file = FileEntry(f"rank_{rank}.pt", 1000 + rank, rank, "rank", rank, (10, 20, 3), (40, 50, 6))
    keys = {f"optimizer.state.{i}.step": "0" * 32 for i in range(plain)}
    own = {f"rng.{i}": f"{rank:032x}" for i in range(differ)}
    return Receipt(
        rank, 0, (file,), {file.name: keys | own}, {}, "table", {"write": 1.0}, {file.name: (0, 1000 + rank)}
    )


def folded(receipts: list[Receipt], width: int) -> list[Any]:
    """As messages come to rank 0 through the first ranks of groups."""
    messages = [json.loads(json.dumps(as_bundle(each))) for each in receipts]
    return [fold_bundles(messages[at : at + width]) for at in range(0, len(messages), width)]


@pytest.mark.parametrize("width", [1, 3, 50])
def test_what_differs_is_the_same_however_receipts_are_put_together(width: int) -> None:
    receipts = [receipt(rank, plain=20) for rank in range(50)]
    opened = open_bundles(folded(receipts, width))
    assert opened.differ == differing(receipts) == ("rng.0", "rng.1", "rng.2")
    assert [each.files for each in opened.receipts] == [each.files for each in receipts]
    assert [each.wrote for each in opened.receipts] == [each.wrote for each in receipts]


def test_a_key_that_only_some_ranks_hold_differs_only_if_these_do() -> None:
    def of(rank: int, kind: str, **keys: str) -> Receipt:
        name = f"{kind}_{rank}.pt"
        return Receipt(rank, 0, (FileEntry(name, 1, 0, kind, rank),), {name: keys})

    receipts = [of(0, "rank", a="1", b="1"), of(1, "rank", a="1"), of(2, "rank", b="2", c="3"), of(3, "model", a="9")]
    for width in (1, 2, 4):
        assert open_bundles(folded(receipts, width)).differ == ("b",)


def test_a_message_grows_with_the_ranks_or_with_the_tensors_but_not_with_their_product() -> None:
    def nbytes(ranks: int, plain: int) -> int:
        return sum(len(json.dumps(part)) for part in folded([receipt(r, plain=plain) for r in range(ranks)], ranks))

    per_rank, per_tensor = nbytes(64, 0) / 64, (nbytes(1, 500) - nbytes(1, 0)) / 500
    assert nbytes(64, 500) < 1.1 * (64 * per_rank + 500 * per_tensor)


def test_disagreements_are_those_that_a_look_at_every_pair_finds() -> None:
    """Of a file that ranks of a shard share all of them hold the same; of tensors in another's file those that do."""
    draw = random.Random(3)
    for _ in range(200):
        receipts = [
            Receipt(
                rank,
                rank % 2,
                (),
                alike={
                    group: str(draw.randrange(2) if draw.random() < 0.2 else 0)
                    for group in (f"model.{rank % 2}.pt", f"replicated.{rank % 2}.pt", "rank_0.pt a b")
                    if draw.random() < 0.9
                },
            )
            for rank in range(6)
        ]
        assert disagreements(receipts) == sorted(
            group
            for group in {group for each in receipts for group in each.alike}
            if any(
                one.alike.get(group) != other.alike.get(group)
                for one in receipts
                for other in receipts
                if (group in one.alike and group in other.alike)
                or (" " not in group and one.shard == other.shard and (group in one.alike or group in other.alike))
            )
        )
