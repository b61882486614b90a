"""In what fsspec's back ends differ, as far as a storage must know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any


def protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def new_instance(cls: type, args: tuple[Any, ...], options: dict[str, Any], tries: int | None) -> Any:
    """A file system like another one, which shares no connection with it."""
    fs = cls(*args, **{**options, "skip_instance_cache": True})
    if tries is not None:
        fs.retries = tries
    return fs


def tries_of(fs: Any) -> int | None:
    """How often the back end itself tries a request; None if that cannot be set."""
    tries = getattr(fs, "retries", None)
    return tries if isinstance(tries, int) else None


def trying_once(options: Mapping[str, object], *, direct: bool = False) -> dict[str, object]:
    """`storage_options` for an S3 client that tries each request once and can have many under way.

    The storage tries again, and counts it; botocore and s3fs would do so unseen, one inside the other, for minutes.
    `direct`: it also signs URLs, which botocore else does in a way that many servers have given up.
    """
    given = options.get("config_kwargs")
    own: dict[str, object] = {"retries": {"max_attempts": 0}, "max_pool_connections": 64}
    if direct:
        own["signature_version"] = "s3v4"
    return {**options, "config_kwargs": {**own, **(given if isinstance(given, Mapping) else {})}}


def publishes_whole(fs: Any) -> bool:
    """Whether the back end puts an object in one call that either happens or does not (object stores, memory).

    The others (local, SFTP, SMB, HDFS) inherit fsspec's `pipe_file`, which opens and writes a file in its place.
    """
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    if isinstance(fs, AsyncFileSystem):
        return type(fs)._pipe_file is not AsyncFileSystem._pipe_file
    return type(fs).pipe_file is not AbstractFileSystem.pipe_file


def delete_objects(fs: Any, paths: Sequence[str]) -> None:
    """Not by `fs.rm`: it takes "*" and "[" in names for patterns."""
    for path in paths:
        with suppress(FileNotFoundError, NotADirectoryError):
            fs.rm_file(path)
