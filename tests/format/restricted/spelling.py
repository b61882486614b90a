"""Pickles spelled by hand, for what no pickler would write."""

from __future__ import annotations

import struct

import torch

from shardckpt.format.tree import TensorRef, encode_tree

HEAD = b"\x80\x02"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOATS = b"ctorch\nFloatStorage\n"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(numel: int, shape: tuple[int, ...], stride: tuple[int, ...], *, storage: bytes = FLOATS) -> bytes:
    """A tensor as a file spells it, with claims of its own."""
    sizes = b"".join([b"(", *map(number, shape), b"t"])
    strides = b"".join([b"(", *map(number, stride), b"t"])
    pid = b"(" + text("storage") + storage + text("0") + text("cpu") + number(numel) + b"tQ"
    return REBUILD + b"(" + pid + b"K\x00" + sizes + strides + b"\x89ccollections\nOrderedDict\n)RtR"


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def laughs(levels: int, innermost: bytes = b"K\x01") -> bytes:
    """A tuple of twice the same tuple of twice the same tuple ...: 2**levels values in a few bytes."""
    data = innermost
    for level in range(levels):
        data += b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86"
    return data


def good() -> bytes:
    tree = {
        "model": {"w": TensorRef(0, torch.float32, (3, 2)), "b": TensorRef(1, torch.uint16, ())},
        "rng": [b"bytes", (1, 2.5, -7, 1 << 90), {"nested": {1, 2}}],
        "size": torch.Size([1]),
    }
    return encode_tree(tree)
