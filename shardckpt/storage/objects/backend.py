"""In what fsspec's back ends differ, as far as a storage must know."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from shardckpt.storage.objects.translate import number_of_code


def protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def new_instance(cls: type, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A file system like another one, which shares no connection with it."""
    return cls(*args, **{**options, "skip_instance_cache": True})


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
    """Not by `fs.rm`: it takes "*" and "[" in names for patterns. Nor by s3fs's bulk delete: it swallows errors."""
    if "s3" in protocols(fs):
        bucket = fs.split_path(paths[0])[0]
        objects = [{"Key": fs.split_path(path)[1]} for path in paths]
        answer = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
        for failed in answer.get("Errors", []):
            code = str(failed.get("Code"))
            raise OSError(number_of_code(code), f"{failed.get('Key')}: {code} {failed.get('Message')}")
        return
    for path in paths:
        with suppress(FileNotFoundError, NotADirectoryError):
            fs.rm_file(path)
