"""Bytes of foreign files, and what their errors are called here. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.index import as_text, load_json, shown
from shardckpt.format.layout import check_file_name
from shardckpt.storage.base import Read, Storage
from shardckpt.tools.moving.seam import TensorFacts, Window

MOST_JSON = 64 << 20
"""Bytes of an index or another JSON file: far more than any has."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Errors of the storage, and of content that is not well-formed (`ValueError`), as errors of a load of `what`."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{what} is not there: {error}") from error
    except EOFError as error:
        raise CheckpointDamagedError(f"{what} is damaged: it ends too early ({error})") from error
    except OSError as error:
        raise CheckpointLoadError(f"{what} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointDamagedError(f"{what} is damaged, or not what its name says: {error}") from error


def named(storage: Storage, key: str) -> str:
    """A file for messages."""
    return f"{key} in {storage.url}"


def read_bytes(storage: Storage, key: str, at: int, nbytes: int) -> bytes:
    content = bytearray(nbytes)
    storage.read_into([Read(key, at, memoryview(content))])
    return bytes(content)


def read_json(storage: Storage, key: str, *, strict: bool = True) -> Any:
    """A JSON file. `ValueError` for what is none, `OSError` from the storage.

    Not `strict`: as Python writes it, with NaN for a loss that was none.
    """
    nbytes = storage.size(key)
    if nbytes > MOST_JSON:
        raise ValueError(f"{nbytes} bytes of JSON, more than the {MOST_JSON} that are read")
    content = read_bytes(storage, key, 0, nbytes)
    if strict:
        return load_json(content)
    try:
        return json.loads(content.decode())
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def read_weight_map(storage: Storage, key: str) -> dict[str, str]:
    """The index of a checkpoint in several files: by tensor the key of its file, which lies in the index's folder.

    Source of the format: `weight_map` of `model.safetensors.index.json` and `pytorch_model.bin.index.json`, as
    `transformers` writes them. `ValueError` for what is none, and for names that lead out of the folder.
    """
    content = read_json(storage, key)
    weight_map = content.get("weight_map") if type(content) is dict else None
    if type(weight_map) is not dict or not weight_map:
        raise ValueError("it has no weight_map, which says where each tensor is")
    folder = key.rpartition("/")[0]
    keys: dict[str, str] = {}
    for name, file in weight_map.items():
        if type(file) is not str:
            raise ValueError(f"the file of a tensor is given as {shown(file)}")
        as_name(name)
        keys[name] = f"{folder}/{check_file_name(file)}" if folder else check_file_name(file)
    return keys


def as_name(name: Any) -> str:
    """The name of a tensor, from a file; `ValueError` for what is no text that could be written down again."""
    as_text(name).encode()
    return str(name)


def merged(files: Mapping[str, Sequence[str]], weight_map: Mapping[str, str]) -> dict[str, str]:
    """By tensor the file from which it is taken, in the order of the index; then what the index does not speak of.

    `files`: which tensors each file has. `ValueError` where the index and the files do not agree.
    """
    for name, file in weight_map.items():
        if name not in files[file]:
            raise ValueError(f"the index says that {file} has {name[:200]}, but it has not")
    found = dict(weight_map)
    for file, names in files.items():
        for name in names:
            if found.setdefault(name, file) != file and name not in weight_map:
                raise ValueError(f"{name[:200]} is in {found[name]} and in {file}, and the index does not say which")
    return found


def check_window(window: Window, facts: TensorFacts) -> None:
    """`ValueError` for a window that leaves its tensor."""
    if window.start < 0 or window.start + len(window.into) > facts.nbytes:
        end = window.start + len(window.into)
        raise ValueError(f"bytes {window.start} to {end} of {window.name}, which has {facts.nbytes}")


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of a storage ("" is its root), and the names in it."""

    storage: Storage
    key: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, storage: Storage, key: str) -> Folder:
        with explained(f"{key or 'the folder'} at {storage.url}"):
            return cls(storage, key, tuple(storage.list(key)))

    def file(self, name: str) -> str:
        """The key of a file in it."""
        return f"{self.key}/{name}" if self.key else name

    def has(self, name: str) -> bool:
        return name in self.names
