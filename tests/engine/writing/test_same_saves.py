"""The tests of saving and loading once more, with another process that writes wherever a path is written to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

import shardckpt as sc
from tests.engine.test_save_and_load import *  # noqa: F403


@pytest.fixture(autouse=True)
def another_process_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plain, used = sc.CheckpointManager.__init__, list[object]()

    def with_process(self: sc.CheckpointManager, root: Any, *args: Any, **options: Any) -> None:
        if isinstance(root, str | os.PathLike) and "://" not in os.fspath(root):
            options.setdefault("manners", sc.Manners(process=True))
            used.append(root)
        plain(self, root, *args, **options)

    monkeypatch.setattr(sc.CheckpointManager, "__init__", with_process)
    yield
    assert used
