from __future__ import annotations

from pathlib import Path

import pytest

from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage


@pytest.fixture(params=["file system", "object store", "disk"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Both kinds of storage in memory, and real files."""
    if request.param == "object store":
        return MemoryObjects("run")
    return MemoryStorage("run") if request.param == "file system" else LocalStorage(tmp_path)


@pytest.fixture
def renaming() -> MemoryStorage:
    return MemoryStorage("run")


@pytest.fixture
def objects() -> MemoryObjects:
    return MemoryObjects("run")
