"""From a URL or a path to a storage: the one place where it is decided which class serves it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace

from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.objects.backend import trying_once
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
_LOCAL = re.compile(r"(?:file|local)://(?:localhost(?=/))?")


def open_storage(
    url_or_path: str | os.PathLike[str], *, storage_options: Mapping[str, object] | None = None
) -> Storage:
    """The storage at a path ("~/runs/a") or URL ("s3://bucket/runs/a", "memory://a"); called on every rank.

    Opening touches nothing: a root that is not there yet is made by the first put. `storage_options` go to the fsspec
    file system, but for two: on S3 `{"client": "direct"}` moves parts and ranges past s3fs, for less processor time;
    on any object store `{"deletes_per_second": 1000}` limits how fast old steps are deleted (S3 has 3,500 writes and
    deletions per second and prefix for all that use it).
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


def _local(path: str, options: Mapping[str, object] | None) -> Storage:
    if options:
        raise ValueError(f"a local path takes no storage_options (given: {', '.join(sorted(options))}): leave them out")
    if not path:
        raise ValueError("an empty path is no storage: use '.' for the current folder")
    return LocalStorage(path)


def _limit(given: object) -> float | None:
    if given is None or (isinstance(given, int | float) and not isinstance(given, bool) and 0 < given < math.inf):
        return given
    raise ValueError(f"deletes_per_second is a number of objects, more than 0; not {given!r:.40}")


def _remote(url: str, options: dict[str, object]) -> Storage:
    import fsspec

    from shardckpt.storage.filesystem import FsspecStorage

    redacted = Redactor(url=url, options=options)
    protocol = url.partition("://")[0]
    in_s3 = protocol in ("s3", "s3a")
    client = options.pop("client", "s3fs") if in_s3 else "s3fs"
    limit = _limit(options.pop("deletes_per_second", None))
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
            transfers = replace(TRANSFERS, deletes_per_second=limit)
            return S3Storage(fs, root, url=url, transfers=transfers, client="direct" if direct else "s3fs")
        return FsspecStorage(fs, root, url=url, transfers=Transfers(deletes_per_second=limit))
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        advice = f"install it with `pip install '{package}'`" if package else redacted(str(error))
        failure = ImportError(f"{redact(url)} needs a package that is not installed: {advice}")
    except Exception as error:
        failure = ValueError(f"cannot open {redact(url)}: {type(error).__name__}: {redacted(str(error))}")
    raise failure
