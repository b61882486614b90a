"""Before anything is saved or loaded: rank 0 puts a token into the root, and a rank of each other node looks for it.

    all           tell from where they see the root (one small message up, and one down)
    rank 0        if that is not one and the same site: puts a small object with a name that nobody has used
    one per site  tries to put an object of the same name, which must be refused
    rank 0        takes the object away, and tells all

The refusal comes from the file system or the server itself, so that what a client believes to be there (the caches of
NFS) does not matter, and nobody has to wait for them. Where rank 0 may only read, the record of a step that is there
takes the place of the token. Of two jobs at once each has a name of its own. Is a job killed in between, its token is
swept later, as any probe is.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from shardckpt.engine.patience import within
from shardckpt.errors import CheckpointError, RootNotSharedError
from shardckpt.gang.announce import announce
from shardckpt.gang.base import Gang, Json
from shardckpt.gang.together import together_gather
from shardckpt.gang.wire.messages import ranks_text
from shardckpt.manager.sharing.sites import Site, far_sites, site_of
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.objects.probe import new_probe

_log = logging.getLogger(__name__)
_PHASE = "look whether the root is shared"


def check_shared(gang: Gang, storage: Storage, *, timeout: timedelta) -> None:
    """`RootNotSharedError` on all ranks if it is not. Called by all, in a conversation."""
    unshared = _Check(gang, storage, timeout).run() if gang.size > 1 else ""
    if unshared:
        raise RootNotSharedError(unshared)


@dataclass(slots=True)
class _Check:
    gang: Gang
    storage: Storage
    timeout: timedelta

    def run(self) -> str:
        """Why it is not shared; "" if it is. The same on all ranks."""
        own = site_of(self.storage).to_json()
        sites = together_gather(self.gang, lambda: own, phase=_PHASE, timeout=self.timeout)
        asked: dict[str, Any]
        if sites is None:
            asked = self._announce(lambda: None)
            return self._look(asked) if asked["of"] else ""
        known = [Site.from_json(site) for site in sites]
        far = far_sites(known)
        token = _Token(self.storage)
        try:
            asked = self._announce(lambda: {"of": sorted(far), **(token.put() if far else {})})
            return self._judge(token, asked, known, far) if far else ""
        finally:
            if token.key:
                with suppress(TimeoutError):
                    within(self.timeout, token.remove, what="removing the token")

    def _look(self, asked: Mapping[str, Any]) -> str:
        """On the others: answer, if asked, and hear what became of it."""
        self._gather(partial(_sees, self.storage, asked) if self.gang.rank in asked["of"] else lambda: True)
        return str(self._announce(lambda: None))

    def _judge(
        self, token: _Token, asked: Mapping[str, Any], known: Sequence[Site], far: Mapping[int, Sequence[int]]
    ) -> str:
        seen = self._gather(lambda: True) or []

        def judge() -> str:
            blind = [leader for leader in far if not seen[leader]]
            if not blind or not token.is_still_there(asked):
                return ""
            return _text(self.storage.url, [(known[leader].node, far[leader]) for leader in blind], known[0].node)

        return str(self._announce(judge))

    def _gather(self, work: Callable[[], Json]) -> list[Any] | None:
        bounded = partial(within, self.timeout, work, what=_PHASE)
        return together_gather(self.gang, bounded, phase=_PHASE, timeout=self.timeout)

    def _announce(self, work: Callable[[], Any]) -> Any:
        bounded = partial(within, self.timeout, work, what=_PHASE)
        return announce(self.gang, bounded, phase=_PHASE, timeout=self.timeout)


class _Token:
    """Of rank 0: what the others are to see."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.key = ""
        """Of the object that was put for this."""

    def put(self) -> dict[str, Any]:
        """What the others are asked for."""
        self.key = new_probe()
        try:
            self._storage.put(self.key, [b"shardckpt: is this seen by all nodes?\n"])
            return {"put": self.key}
        except OSError as error:
            _log.info(
                "nothing can be put into %s, so a record that is there is looked for: %s", self._storage.url, error
            )
            self.key = ""
        return {"record": _newest_record(self._storage)}

    def is_still_there(self, asked: Mapping[str, Any]) -> bool:
        """Whether it could be seen all the time: a step may have been deleted by another job meanwhile."""
        return "put" in asked or asked["record"] == _record(self._storage, asked["record"])

    def remove(self) -> None:
        try:
            self._storage.delete([self.key])
        except OSError as error:
            _log.warning("%s/%s could not be removed: %s", self._storage.url, self.key, error)


def _sees(storage: Storage, asked: Mapping[str, Any]) -> bool:
    """On one rank of another site: whether what rank 0 has there is there, too."""
    if "record" in asked:
        return asked["record"] is None or _record(storage, asked["record"]) == asked["record"]
    key, is_new = asked["put"], isinstance(storage, LocalStorage) and not os.path.exists(storage.url)
    try:
        storage.put(key, [b"shardckpt: is this seen by rank 0?\n"])
    except FileExistsError:
        return True
    except OSError:  # this rank may only read, or its disk is full
        with suppress(OSError):
            return storage.size(key) > 0
        return False
    storage.delete([key])
    if is_new:
        with suppress(OSError):
            os.rmdir(storage.url)
    return False


def _newest_record(storage: Storage) -> list[Any] | None:
    """Key and sum of the record of a step that is there; None if there is none."""
    with suppress(OSError, CheckpointError):
        newest = Catalog(storage).latest()
        return None if newest is None else _record(storage, [newest.record_key, 0])
    return None


def _record(storage: Storage, record: Sequence[Any] | None) -> list[Any] | None:
    """The same of what lies there now under that key."""
    if record is None:
        return None
    with suppress(OSError):
        return [record[0], zlib.crc32(storage.read(record[0]))]
    return None


def _text(url: str, blind: Sequence[tuple[str, Sequence[int]]], own: str) -> str:
    listed = ", ".join(f"{ranks_text(ranks)} (on {node})" for node, ranks in blind[:8])
    more = f" and those of {len(blind) - 8} other nodes" if len(blind) > 8 else ""
    return (
        f"the root is not one place for all ranks: {listed}{more} do not see what rank 0 (on {own}) has in {url}. "
        "Nothing was saved or loaded. Give all ranks the same root, which all nodes share: a file system that each of "
        "them mounts there (NFS, Lustre), or the URL of an object store. A disk of each node can hold a run of that "
        "node's ranks alone (Gangs.from_mesh of their mesh), if they have the whole state"
    )
