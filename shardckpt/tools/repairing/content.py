"""What one file of a step holds, by its index and its nesting, in terms that two files can be compared by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from shardckpt.format.checksum import value_digest
from shardckpt.format.index import ArchiveIndex, StoredBox
from shardckpt.format.layout import MODEL_KEY
from shardckpt.format.tree import decode_tree, map_leaves
from shardckpt.state import Path, join_path


@dataclass(slots=True)
class Content:
    """Its boxes by tensor, and by key a digest of each Python value."""

    index: ArchiveIndex
    boxes: Mapping[str, list[StoredBox]] = field(default_factory=dict)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Name to dtype and local shape, also of shards without elements, of which there is no box."""
    values: dict[str, str] = field(default_factory=dict)
    gaps: dict[str, str] = field(default_factory=dict)
    """Places in lists where None stands, which may be values, or places that another file fills."""
    model_key: str | None = None

    def is_like(self, other: Content) -> bool:
        """Whether it holds the same tensors in the same places, and values of the same names."""
        kinds = [[(record.dtype, record.shape, record.at) for record in one.index.records] for one in (self, other)]
        same = self.index.boxes == other.index.boxes and kinds[0] == kinds[1] and self.tensors == other.tensors
        return same and self.values.keys() == other.values.keys() and self.gaps.keys() == other.gaps.keys()

    def digest(self, name: str) -> str:
        """Of a tensor that lies whole in this file."""
        boxes = self.boxes.get(name, [])
        return f"{self.tensors[name]}{self.index.records[boxes[0].record].crc if boxes else 0:08x}"


def content_of(index: ArchiveIndex, tree: bytes) -> Content:
    """`ValueError` for a nesting that is not on the allow-list, or not well-formed."""
    content = Content(index, index.by_name())

    def look(path: Path, leaf: Any) -> None:
        name = join_path(path)
        if path == (MODEL_KEY,):
            content.model_key = str(leaf)
        elif isinstance(leaf, torch.Tensor):
            content.tensors[name] = (str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape))
        elif leaf is None and isinstance(path[-1], int):
            content.gaps[name] = value_digest(leaf)
        else:
            content.values[name] = value_digest(leaf)

    nesting = decode_tree(tree)
    if nesting:
        map_leaves(nesting, look)
    return content
