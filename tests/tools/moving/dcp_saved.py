"""Checkpoints that DCP's own writer makes, also as older versions of torch made them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import metadata as sharded
from torch.distributed.checkpoint import _version

METADATA = ".metadata"


def state() -> dict[str, Any]:
    """Every form in which DCP puts something away: strides, no elements, no dimensions, odd dtypes, values."""
    return {
        "model": {
            "w": torch.arange(6000.0).view(60, 100),
            "turned": torch.arange(60.0).view(5, 12).t(),
            "image": torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "half": torch.arange(7, dtype=torch.bfloat16),
            "eighth": torch.arange(5.0).to(torch.float8_e4m3fn),
            "count": torch.tensor(7),
            "empty": torch.empty(0, 3),
            "flags": torch.tensor([True, False, True]),
        },
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}],
        "note": "as it was",
        "pair": (torch.arange(6.0)[1:4], torch.ones(2, 2).t()),
        "nothing": None,
        "bytes": b"",
    }


def blank(tree: Any) -> Any:
    """The same nesting with nothing in it."""
    if isinstance(tree, torch.Tensor):
        return torch.zeros_like(tree)
    if isinstance(tree, dict):
        return {key: blank(value) for key, value in tree.items()}
    return [blank(value) for value in tree] if isinstance(tree, list) else "blank"


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    if type(one) is not type(other):
        return [f"{path}: {type(one)} is not {type(other)}"]
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.float(), other.float())
        return [] if alike else [f"{path}: {one} is not {other}"]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{path}: {list(one)} are not {list(other)}"]
        return [d for key in one for d in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{path}.{i}")]
    return [] if one == other else [f"{path}: {one} is not {other}"]


def save(place: Path, content: dict[str, Any] | None = None, **options: Any) -> Path:
    dcp.save(state() if content is None else content, storage_writer=dcp.FileSystemWriter(place, **options))
    return place


def edit(place: Path, change: Callable[[Any], object], protocol: int = 4) -> None:
    """Change the metadata that lies there, as an object."""
    metadata = pickle.loads((place / METADATA).read_bytes())
    change(metadata)
    (place / METADATA).write_bytes(pickle.dumps(metadata, protocol=protocol))


def save_as(layout: str, place: Path) -> Path:
    """What an earlier torch would have written: its names, its classes, and no field that came later.

    The fields of an object are those of its `__dict__`: what is taken out of there is not in the pickle.
    """
    _version._derived_version = "2_3" if layout in ("shards", "paths") else None  # torch's own way to the older names
    try:
        save(place)
    finally:
        _version._derived_version = None
    edit(place, LAYOUTS[layout], protocol=5 if layout == "protocol 5" else 4)
    return place


def _before_version(metadata: Any) -> None:
    vars(metadata).pop("version", None)


def _before_transforms(metadata: Any) -> None:
    _before_version(metadata)
    vars(metadata.storage_meta).pop("modules", None)
    for info in metadata.storage_data.values():
        vars(info).pop("transform_descriptors", None)


def _with_a_path(metadata: Any) -> None:
    _before_transforms(metadata)
    metadata.storage_meta.checkpoint_id = Path("/scratch/run/step_1")


def _of_sharded_tensors(metadata: Any) -> None:
    _before_transforms(metadata)
    vars(metadata).pop("storage_meta")
    for entry in metadata.state_dict_metadata.values():
        if hasattr(entry, "properties"):
            entry.properties = sharded.TensorProperties(dtype=entry.properties.dtype)


LAYOUTS: dict[str, Callable[[Any], object]] = {
    "shards": _of_sharded_tensors,
    "paths": _with_a_path,
    "before transforms": _before_transforms,
    "before version": _before_version,
    "now": lambda _: None,
    "protocol 5": lambda _: None,
}
"""Oldest first, from torch 2.2 on; see `shardckpt.format.foreign.dcp`."""
