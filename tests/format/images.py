"""Whole archive images in memory, built as the engine builds them, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shardckpt.format.archive import ArchiveLayout, Tail, lay_out, make_tail, write_crcs, write_headers
from shardckpt.format.checksum import crc32
from shardckpt.format.index import ITEMSIZE, StoredBox, StoredRecord, encode_index
from shardckpt.format.placement import Box
from shardckpt.format.tree import TensorRef, encode_tree

DTYPES = {name: getattr(torch, name) for name in ITEMSIZE if hasattr(torch, name)}


@dataclass(frozen=True)
class Image:
    """A finished file, and what it was made of."""

    content: bytes
    layout: ArchiveLayout
    crcs: list[int]
    tail: Tail
    records: list[StoredRecord]
    boxes: list[StoredBox]
    tree: bytes


def build_image(state: Any) -> Image:
    """The archive of nested dicts, lists and tuples with tensors; the same tensor object twice is one record."""
    tensors: list[torch.Tensor] = []
    boxes: list[StoredBox] = []

    def visit(node: Any, path: str) -> Any:
        if type(node) is dict:
            return {key: visit(item, f"{path}.{key}") for key, item in node.items()}
        if type(node) in (list, tuple):
            return type(node)(visit(item, f"{path}.{i}") for i, item in enumerate(node))
        if not isinstance(node, torch.Tensor):
            return node
        number = next((i for i, tensor in enumerate(tensors) if tensor is node), len(tensors))
        if number == len(tensors):
            tensors.append(node)
        shape = tuple(node.shape)
        zeros = (0,) * len(shape)
        boxes.append(StoredBox(path, number, shape, Box(zeros, shape, zeros)))
        return TensorRef(number, node.dtype, shape)

    tree = encode_tree(visit(state, ""))
    data = [bytes_of(tensor) for tensor in tensors]
    layout = lay_out([len(piece) for piece in data])
    image = bytearray(layout.tail)
    write_headers(layout, memoryview(image))
    for slot, piece in zip(layout.slots, data, strict=True):
        image[slot.data : slot.end] = piece
    crcs = [crc32(piece) for piece in data]
    write_crcs(layout, memoryview(image), crcs)
    records = [
        StoredRecord(name_of(tensor.dtype), tuple(tensor.shape), slot.data, slot.nbytes, crc)
        for tensor, slot, crc in zip(tensors, layout.slots, crcs, strict=True)
    ]
    tail = make_tail(layout, crcs, encode_index(records, boxes), tree)
    return Image(bytes(image) + tail.content, layout, crcs, tail, records, boxes, tree)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def some_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of random bits; zeros and ones where it is of booleans."""
    draw = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=draw, dtype=torch.uint8).view(torch.bool)
    return torch.randint(0, 256, (numel * dtype.itemsize,), generator=draw, dtype=torch.uint8).view(dtype).view(shape)


def is_same(left: Any, right: Any) -> bool:
    """Equal in structure, types and every bit of every tensor."""
    if isinstance(left, torch.Tensor):
        alike = type(right) is torch.Tensor and left.dtype == right.dtype and left.shape == right.shape
        return alike and bytes_of(left) == bytes_of(right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(is_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(is_same, left, right))
    return bool(left == right or (left != left and right != right))
