"""Setting the steps of a run aside, for a fresh start in the same place. On rank 0, in any one thread."""

from __future__ import annotations

from shardckpt.errors import CheckpointSaveError
from shardckpt.format.layout import PINS, new_attempt
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import RenamingStorage

_PREFIX = "earlier_"


def set_aside(catalog: Catalog) -> str:
    """Move all committed steps, and their pins, into a new folder of the root, which is a run by itself; give its name.

    Each step is moved by one rename: a crash in between leaves some here and some there, all of them whole.
    `CheckpointSaveError` where folders cannot be renamed, and if something failed; then the same holds.
    """
    storage = catalog.storage
    if not isinstance(storage, RenamingStorage):
        raise CheckpointSaveError(
            f"the steps in {storage.url} cannot be set aside, for object stores rename nothing: take another root"
        )
    folder = f"{_PREFIX}{new_attempt()}"
    try:
        storage.make_folder(folder)
        for entry in catalog.entries():  # also one that a crash has left under the name of a replaced one
            storage.rename_folder(entry.folder, f"{folder}/{entry.folder}")
        if storage.list(PINS):  # they are of these steps, not of later ones of the same numbers
            storage.rename_folder(PINS, f"{folder}/{PINS}")
    except OSError as error:
        raise CheckpointSaveError(f"not all steps in {storage.url} were set aside in {folder}: {error}") from error
    return folder
