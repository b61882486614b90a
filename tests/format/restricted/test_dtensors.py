"""What a pickle says of a DTensor, and pickles that say it wrongly."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import ShardOrderEntry

from shardckpt.format.restricted.foreign import StoredShard, read_foreign
from shardckpt.storage.memory import MemoryStorage
from shardckpt.tools.moving.folders import open_source
from tests.hostile.dtensors import PLACED, WHOLE, files, part
from tests.tools.moving.reading import same, tensors_of


def tree_of(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.read(next(name for name in opened.namelist() if name.endswith("/data.pkl")))


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", PLACED)
def test_the_parts_of_all_ranks_are_the_whole(name: str, protocol: int) -> None:
    storage = MemoryStorage()
    for rank, content in enumerate(files(*PLACED[name], pickle_protocol=protocol)):
        storage.put(f"model_{rank}.pt", [content])
        storage.put(f"step_{rank}.pt", [content])  # a second item, so that one rank's file is one of several
    for piece in (1000, 5):
        source = open_source(storage, parts=["model"])
        assert same(tensors_of(source, piece=piece), {"model.w": WHOLE, "model.t": torch.ones(3)})


def save(change: Callable[[Any], None], **options: Any) -> bytes:
    tensor = part(WHOLE, (2, 2), (Shard(0), Shard(1)), 1)
    change(tensor._spec)
    torch.save({"w": tensor}, buffer := io.BytesIO(), **options)
    return tree_of(buffer.getvalue())


def with_placements(*placements: Any) -> Callable[[Any], None]:
    return lambda spec: vars(spec).update(placements=placements)


def with_order(*dims: int) -> Callable[[Any], None]:
    def change(spec: Any) -> None:
        vars(spec).update(placements=(Shard(0), Shard(0)), shard_order=(ShardOrderEntry(0, dims),))

    return change


def with_mesh(**fields: Any) -> Callable[[Any], None]:
    return lambda spec: vars(spec.mesh).update(fields)


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "a sum": (with_placements(Partial(), Shard(0)), "a sum still to be done"),
    "an order of its own": (with_order(1, 0), "in an order of their own"),
    "fewer placements": (with_placements(Shard(0)), "not those of its mesh"),
    "other placements": (with_placements(Replicate(), Shard(1)), "not the shape that its placements say"),
    "no such dimension": (with_placements(Shard(0), Shard(7)), "of a tensor of 2 dimensions"),
    "no coordinate": (with_mesh(_coordinate_on_dim=None), "not those of its mesh"),
    "outside of the mesh": (with_mesh(_coordinate_on_dim=(0, 5)), "is not on a mesh"),
    "no layout": (with_mesh(_layout=None), "without a layout that is known"),
    "a negative coordinate": (with_mesh(_coordinate_on_dim=(0, -1)), "should be a size"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_told_wrongly_is_refused(case: str) -> None:
    change, told = WRONG[case]
    with pytest.raises(ValueError, match=told):
        read_foreign(save(change))


def test_nothing_of_torch_is_made() -> None:
    tree = read_foreign(save(lambda spec: None))
    assert type(tree["w"]) is StoredShard
    assert (tree["w"].shape, tree["w"].local.shape) == ((5, 7), (3, 3))
    torch.save({"spec": part(WHOLE, (2, 2), (Shard(0), Shard(1)), 1)._spec}, buffer := io.BytesIO())
    with pytest.raises(ValueError, match="a placement of DTensors is no state"):
        read_foreign(tree_of(buffer.getvalue()))
