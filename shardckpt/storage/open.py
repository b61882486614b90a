"""From a URL or a path to a storage: the one place where it is decided which class serves it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.objects.backend import trying_once
from shardckpt.storage.objects.parts import LEAST
from shardckpt.storage.objects.secrecy import Redactor, redact
from shardckpt.storage.transfer.amounts import Transfers

# What to install for a protocol: our own extra where there is one, else the package that fsspec names.
_PACKAGES = {
    "s3": "shardckpt[s3]",
    "s3a": "shardckpt[s3]",
    "gs": "shardckpt[gcs]",
    "gcs": "shardckpt[gcs]",
    "az": "shardckpt[azure]",
    "abfs": "shardckpt[azure]",
    "abfss": "shardckpt[azure]",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
}
_LARGEST_PART = 1 << 30
_LOCAL = re.compile(r"(?:file|local)://(?:localhost(?=/))?")


def open_storage(
    url_or_path: str | os.PathLike[str], *, storage_options: Mapping[str, object] | None = None
) -> Storage:
    """The storage at a path ("~/runs/a") or URL ("s3://bucket/runs/a", "memory://a"); called on every rank.

    Opening touches nothing: a root that is not there yet is made by the first put. `storage_options` go to the fsspec
    file system, but for three. On S3 `{"client": "direct"}` moves parts and ranges past s3fs, for less processor time,
    and `{"part_nbytes": 64 << 20}` sends fewer and larger parts (`objects/PREFIXES.md`). On any object store
    `{"deletes_per_second": 1000}` limits how fast old steps are deleted.
    `ValueError` for a URL that cannot be served, `ImportError` if its package is not installed; neither they nor
    anything else shows what the URL or the options keep secret.
    """
    text = os.fspath(url_or_path)
    if not isinstance(url_or_path, str) or "://" not in text:
        return _local(text, storage_options)
    if local := _LOCAL.match(text):
        return _local(text[local.end() :], storage_options)
    if "::" in text:
        raise ValueError(
            f"{redact(text)!r} chains file systems: a cache in between would show old data, an archive cannot be "
            "written by many; give the URL of the place itself"
        )
    return _remote(text, dict(storage_options or {}))


def options_for(
    url_or_path: str | os.PathLike[str], storage_options: Mapping[str, object] | None
) -> Mapping[str, object] | None:
    """The options, or none for a local path, which takes none: for tools that have one set for all their places."""
    text = os.fspath(url_or_path)
    is_url = isinstance(url_or_path, str) and "://" in text and not _LOCAL.match(text)
    return storage_options if is_url else None


def _local(path: str, options: Mapping[str, object] | None) -> Storage:
    if options:
        raise ValueError(f"a local path takes no storage_options (given: {', '.join(sorted(options))}): leave them out")
    if not path:
        raise ValueError("an empty path is no storage: use '.' for the current folder")
    return LocalStorage(path)


def _amounts(options: dict[str, object], *, in_s3: bool) -> dict[str, Any]:
    """What is said of amounts, taken out of the options."""
    taken: dict[str, Any] = {}
    limit = options.pop("deletes_per_second", None)
    if limit is not None:
        if not isinstance(limit, int | float) or isinstance(limit, bool) or not 0 < limit < math.inf:
            raise ValueError(f"deletes_per_second is a number of objects, more than 0; not {limit!r:.40}")
        taken["deletes_per_second"] = limit
    nbytes = options.pop("part_nbytes", None) if in_s3 else None
    if nbytes is not None:
        if not isinstance(nbytes, int) or not LEAST <= nbytes <= _LARGEST_PART:
            raise ValueError(f"part_nbytes is a number of bytes from {LEAST} to {_LARGEST_PART}, not {nbytes!r:.40}")
        # What fits in one part goes out in one; and four are under way, whatever that takes.
        taken |= {
            "part_nbytes": nbytes,
            "whole_nbytes": max(nbytes, 16 << 20),
            "wave_nbytes": max(4 * nbytes, 64 << 20),
        }
    return taken


def _remote(url: str, options: dict[str, object]) -> Storage:
    import fsspec

    from shardckpt.storage.filesystem import FsspecStorage

    redacted = Redactor(url=url, options=options)
    protocol = url.partition("://")[0]
    in_s3 = protocol in ("s3", "s3a")
    client = options.pop("client", "s3fs") if in_s3 else "s3fs"
    amounts = _amounts(options, in_s3=in_s3)
    direct = client == "direct"
    if not direct and client != "s3fs":
        raise ValueError(f"cannot open {redact(url)}: `client` must be 's3fs' or 'direct'")
    # Listings that fsspec keeps would hide what other processes wrote; instances that it keeps are the caller's, too.
    fresh = {"use_listings_cache": False, "skip_instance_cache": True}
    failure: Exception
    try:
        fs, root = fsspec.url_to_fs(url, **{**(trying_once(options, direct=direct) if in_s3 else options), **fresh})
        if in_s3:
            from shardckpt.storage.s3 import TRANSFERS, S3Storage

            fs.retries = 1
            transfers = replace(TRANSFERS, **amounts)
            return S3Storage(fs, root, url=url, transfers=transfers, client="direct" if direct else "s3fs")
        return FsspecStorage(fs, root, url=url, transfers=Transfers(**amounts))
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        advice = f"install it with `pip install '{package}'`" if package else redacted(str(error))
        failure = ImportError(f"{redact(url)} needs a package that is not installed: {advice}")
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        failure = ValueError(f"cannot open {redact(url)}: {kind}{redacted(str(error))}")
    raise failure
