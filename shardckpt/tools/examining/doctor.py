"""Examine this machine and a place: what works, what it costs, what to set. Leaves nothing behind. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing

from shardckpt.errors import CheckpointLoadError
from shardckpt.storage.objects.secrecy import redact
from shardckpt.storage.open import open_storage
from shardckpt.tools.examining.findings import Examination
from shardckpt.tools.examining.machine import examine_machine
from shardckpt.tools.examining.place import examine_place


def examine(
    url: str | os.PathLike[str] | None = None,
    *,
    nbytes: int = 64 << 20,
    storage_options: Mapping[str, object] | None = None,
) -> Examination:
    """What was found. In any one thread.

    `CheckpointLoadError` if nothing can be put at the place; `ValueError`, `ImportError` for a URL that is none.

    Args:
        url: where checkpoints are to lie; it need not be there yet.
        nbytes: of the file by which rates are measured, three times there and back.
        storage_options: for fsspec; never logged.
    """
    findings = list(examine_machine())
    if url is None:
        return Examination(None, tuple(findings))
    with closing(open_storage(url, storage_options=storage_options)) as storage:
        try:
            findings += examine_place(storage, nbytes=nbytes)
        except OSError as error:
            raise CheckpointLoadError(f"cannot write to {redact(os.fspath(url))}: {error}") from error
        return Examination(storage.url, tuple(findings))
