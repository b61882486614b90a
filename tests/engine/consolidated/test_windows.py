"""A window's memory is used again when nobody holds it any more, and never before."""

from __future__ import annotations

import torch

from shardckpt.engine.consolidated.assembling.windows import Windows
from shardckpt.engine.consolidated.fragments import WINDOW
from shardckpt.storage.transfer.ranges import as_bytes


def address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def test_what_is_held_in_any_way_is_not_used_again():
    pool = Windows()
    first = pool.take().data
    views = [first[10:20], as_bytes(first[4:])[8:], first.cast("I")]
    tensor = torch.from_numpy(pool.take())
    taken = {address(first), tensor.data_ptr()}
    del first
    for _ in range(len(views)):
        fresh = pool.take().data
        assert address(fresh) not in taken
        del fresh
        views.pop()
    here = tensor[5:9]
    del tensor
    other = pool.take().data
    assert address(other) + 5 != here.data_ptr()


def test_what_is_let_go_is_used_again():
    pool = Windows()
    addresses = set()
    for _ in range(20):
        array = pool.take()
        assert array.nbytes == WINDOW
        assert array.ctypes.data % 4096 == 0
        addresses.add(array.ctypes.data)
        view = array.data[:100]
        del array, view
    assert len(addresses) == 1
