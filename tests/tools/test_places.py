"""Tools that go from one place to another have one set of options for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import shardckpt as sc
from shardckpt.storage.open import options_for
from shardckpt.tools.copying.steps import copy_steps
from tests.storage.conftest import place, s3
from tests.storage.s3server import S3Server
from tests.tools.making import save

__all__ = ["place", "s3"]  # fixtures


@pytest.mark.s3
def test_from_a_store_that_needs_options_to_a_local_path_and_back(
    s3: S3Server, place: Callable[[S3Server], str], tmp_path: Path
) -> None:
    url, options = place(s3), dict(s3.options)
    save(tmp_path / "run", 1)
    assert copy_steps(tmp_path / "run", url, storage_options=options).ok
    means = sc.Means(storage_options=options)
    sc.convert(url, tmp_path / "back", means=means)
    sc.export(url, tmp_path / "model.safetensors", means=means)
    assert sc.verify(tmp_path / "back", storage_options=options).ok


def test_local_paths_are_told_from_urls() -> None:
    options = {"key": "k"}
    for local in ("runs/a", "/a", Path("/a"), "file:///a", "local://a"):
        assert options_for(local, options) is None
    for url in ("s3://b/a", "memory://a"):
        assert options_for(url, options) is options
