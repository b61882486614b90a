"""DCP's `Metadata` of a checkpoint of ours, made from its record; nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from shardckpt.engine.loading.sources import Chunk, Sources
from shardckpt.errors import CheckpointError
from shardckpt.format.tree import map_leaves
from shardckpt.state import join_path


def make_metadata(sources: Sources, trees: Callable[[], list[Any]], *, checkpoint_id: str) -> Metadata:
    """Every key of the checkpoint. `trees` gives the nested values of all files, and is called only if asked for."""
    entries: dict[str, STORAGE_TYPES] = {}
    made: dict[int, tuple[list[Chunk], list[ChunkStorageMetadata]]] = {}  # shared by the many tensors that lie alike
    for name in sources.names():
        entry = sources.tensor(name)
        if entry is None:
            entries[name] = BytesStorageMetadata()
            continue
        chunks = sources.chunks(name, "first")  # where they lie is looked up again when it is known who asks
        if id(chunks) not in made:  # kept in there too, so that its id is nobody else's
            boxes = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.lengths)) for _, box in chunks]
            made[id(chunks)] = (chunks, boxes)
        properties = TensorProperties(dtype=getattr(torch, entry.dtype))
        entries[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), made[id(chunks)][1])
    return Metadata(entries, planner_data=LazyPaths(trees), storage_meta=StorageMeta(checkpoint_id=checkpoint_id))


class LazyPaths(Mapping[str, tuple[str | int, ...]]):
    """By flat name, the keys that lead to it in the nested state: what DCP wants when it is to build the state itself.

    A load into a state that is there does not ask; so the files are opened when somebody does.
    """

    def __init__(self, trees: Callable[[], list[Any]]) -> None:
        self._trees = trees

    @cached_property
    def _paths(self) -> dict[str, tuple[str | int, ...]]:
        paths: dict[str, tuple[str | int, ...]] = {}
        for tree in self._trees():
            map_leaves(_with_text_keys(tree), lambda path, _: paths.setdefault(join_path(path), path))
        return paths

    def __getitem__(self, name: str) -> tuple[str | int, ...]:
        return self._paths[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class UnreadableMetadata(Metadata):
    """Stands for metadata that could not be read: whoever looks into it gets the error.

    2026-11: torch 2.13 takes an exception of `read_metadata` for an older format and ends in a bare `AssertionError`
    about something else. So the error waits for the next call, and is then raised by DCP on all ranks as it is.
    """

    def __init__(self, error: CheckpointError) -> None:
        self.error = error

    def __getattr__(self, name: str) -> NoReturn:
        raise self.error if name == "state_dict_metadata" else AttributeError(name)


def _with_text_keys(node: Any) -> Any:
    """DCP tells dicts from lists by whether a key is a text."""
    if isinstance(node, dict):
        return {str(key): _with_text_keys(item) for key, item in node.items()}
    if type(node) in (list, tuple):
        return type(node)(_with_text_keys(item) for item in node)
    return node
