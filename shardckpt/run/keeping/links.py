"""`latest` and `best` in the root, links to steps, for people and for tools of theirs. Nothing here ever reads them.

Rank 0 only, in any one thread at a time. Relative, so that a run may be moved; each is put in place by one rename.
"""

from __future__ import annotations

import logging
import re

from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import LinkingStorage

_log = logging.getLogger(__name__)

LATEST, BEST = "latest", "best"
_LEFT = re.compile(r"(latest|best)\.[0-9a-f]{16}\.tmp")
"""What a crash in the middle leaves."""


def update_links(catalog: Catalog, *, best: int | None) -> None:
    """Have `latest` lead to the newest committed step and `best` to this one; a link to nothing goes.

    Nothing where the storage has no links. What is no link but has such a name stays, and is logged.
    """
    storage = catalog.storage
    if not isinstance(storage, LinkingStorage):
        return
    folders = {entry.step: entry.folder for entry in catalog.entries()}
    wanted = {LATEST: folders.get(max(folders, default=-1)), BEST: None if best is None else folders.get(best)}
    try:
        storage.delete(name for name in storage.list() if _LEFT.fullmatch(name) and storage.read_link(name) is not None)
        for name, folder in wanted.items():
            there = storage.read_link(name)
            if folder is None and there is not None:
                storage.delete([name])
            elif folder is not None and there != folder:
                storage.link(name, folder)
    except OSError as error:
        _log.warning("the links to steps in %s are not up to date: %s", storage.url, error)


def sweep_links(catalog: Catalog) -> None:
    """Remove those of the two that lead to no committed step; for who does not know which step is the best."""
    storage = catalog.storage
    if not isinstance(storage, LinkingStorage):
        return
    folders = {entry.folder for entry in catalog.entries()}
    try:
        targets = {name: storage.read_link(name) for name in (LATEST, BEST)}
        storage.delete(name for name, target in targets.items() if target is not None and target not in folders)
    except OSError as error:
        _log.warning("the links to steps in %s are not up to date: %s", storage.url, error)
