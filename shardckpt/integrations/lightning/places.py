"""Steps as the paths by which Lightning knows checkpoints. By one rank alone, before there is a manager."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

from shardckpt.errors import CheckpointError
from shardckpt.format.layout import MANIFEST, parse_step, step_folder
from shardckpt.manager.steps.resuming import split_step
from shardckpt.run.catalog import Catalog
from shardckpt.run.history import History
from shardckpt.run.retention import Policy
from shardckpt.storage.open import open_storage

Options = Mapping[str, object] | None


def place_of(root: str, step: int) -> str:
    """What Lightning is told: the folder, or on object stores, which have none, the record in it."""
    folder = f"{root.rstrip('/')}/{step_folder(step)}"
    return f"{folder}/{MANIFEST}" if "://" in root else folder


def step_at(root: str, place: str | os.PathLike[str]) -> int | None:
    """The step of that run that such a place is; None if it is none."""
    text = _folder(place)
    run, _, name = text.rpartition("/")
    return parse_step(name) if run == root.rstrip("/") else None


def is_ours(place: str | os.PathLike[str], options: Options) -> bool:
    """Whether there is a run of ours with a step, or the step itself."""
    root, step = split_step(_folder(place))
    try:
        steps = steps_in(root, options if "://" in root else None)
    except (CheckpointError, OSError, ValueError):
        return False
    return bool(steps) if step is None else step in steps


def run_or_step(place: str | os.PathLike[str]) -> str:
    """As `CheckpointManager.resume` is given it."""
    return _folder(place)


def steps_in(root: str, options: Options) -> list[int]:
    """The committed steps, in order; none where there is nothing."""
    storage = open_storage(root, storage_options=options)
    try:
        return list(Catalog(storage).steps())
    finally:
        storage.close()


def best_in(root: str, policy: Policy, options: Options) -> int | None:
    """The best step by that policy; None if none has the metric."""
    storage = open_storage(root, storage_options=options)
    try:
        _, steps, _ = History(Catalog(storage), policy, grace=timedelta(hours=1)).best_first()
        return steps[0] if steps else None
    finally:
        storage.close()


def _folder(place: str | os.PathLike[str]) -> str:
    return os.fspath(place).rstrip("/").removesuffix(f"/{MANIFEST}")
