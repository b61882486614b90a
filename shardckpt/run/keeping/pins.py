"""Pins: steps that are kept whatever a policy says. Each is an object `pins/step_N` in the root: one listing tells.

A pin is of a number: it holds for a step that is saved again, until it is taken away. Who deletes a step by name
deletes it also if it is pinned. Any process may pin or unpin beside a job; its next pruning heeds it. Rank 0 only, in
any one thread.
"""

from __future__ import annotations

from shardckpt.errors import CheckpointLoadError, CheckpointSaveError
from shardckpt.format.layout import PINS, parse_step, step_folder
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import Storage


def pin(catalog: Catalog, step: int) -> None:
    """Pin a committed step. `CheckpointNotFoundError` if there is none of that number."""
    catalog.entry(step)
    try:
        catalog.storage.replace(_key(step), b"")
    except OSError as error:
        raise CheckpointSaveError(f"step {step} was not pinned: {error}", step=step) from error


def unpin(storage: Storage, step: int) -> None:
    """Take a pin away, if there is one."""
    try:
        storage.delete([_key(step)])
    except OSError as error:
        raise CheckpointSaveError(f"step {step} is still pinned, perhaps: {error}", step=step) from error


def pinned_steps(storage: Storage) -> frozenset[int]:
    """The numbers that are pinned, whether there are such steps or not. `CheckpointLoadError` if it cannot be told."""
    try:
        steps = {parse_step(name) for name in storage.list(PINS)}
    except OSError as error:
        raise CheckpointLoadError(f"cannot tell which steps in {storage.url} are pinned: {error}") from error
    return frozenset(step for step in steps if step is not None)


def _key(step: int) -> str:
    return f"{PINS}/{step_folder(step)}"
