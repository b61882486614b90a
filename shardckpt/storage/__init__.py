"""Where bytes live: a rooted place of string keys to bytes, on disks, in object stores, in memory.

Importing this imports neither fsspec nor any of its back ends: `FsspecStorage`, `S3Storage` and `RetryingStorage` are
imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shardckpt.storage.base import (
    Buffer,
    LinkingStorage,
    PutPart,
    Read,
    RenamingStorage,
    SharedPuts,
    Storage,
    UploadId,
    check_folder,
    check_key,
)
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage, ReadCount
from shardckpt.storage.objects.secrecy import redact
from shardckpt.storage.open import open_storage
from shardckpt.storage.posix.write import METHODS, MethodName, WriteMethod
from shardckpt.storage.transfer.amounts import Transfers
from shardckpt.storage.wrapping import Operation, StorageWrapper

if TYPE_CHECKING:
    from shardckpt.storage.filesystem import FsspecStorage
    from shardckpt.storage.retrying import RetryingStorage, RetryPolicy, is_transient, retries_of
    from shardckpt.storage.s3 import S3Storage

_LATER = {
    "FsspecStorage": "filesystem",
    "RetryPolicy": "retrying",
    "RetryingStorage": "retrying",
    "S3Storage": "s3",
    "is_transient": "retrying",
    "retries_of": "retrying",
}

__all__ = [
    "METHODS",
    "Buffer",
    "FsspecStorage",
    "LinkingStorage",
    "LocalStorage",
    "MemoryObjects",
    "MemoryStorage",
    "MethodName",
    "Operation",
    "PutPart",
    "Read",
    "ReadCount",
    "RenamingStorage",
    "RetryPolicy",
    "RetryingStorage",
    "S3Storage",
    "SharedPuts",
    "Storage",
    "StorageWrapper",
    "Transfers",
    "UploadId",
    "WriteMethod",
    "check_folder",
    "check_key",
    "is_transient",
    "open_storage",
    "redact",
    "retries_of",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
