"""What the package imports is declared, and what is declared is pinned for our own set-ups."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.house.dependencies import problems
from tests.house.source import ROOT, sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PLANTED = {
    "dependencies": ["torch>=2.7"],
    "optional-dependencies": {"s3": ["s3fs>=2025.3"], "test": ["moto"], "testing": ["pytest"]},
}


def test_every_import_is_declared() -> None:
    assert problems(sources(ROOT, "shardckpt"), PROJECT) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import requests", "no dependency brings requests"),
        ("def f():\n    import moto", "no dependency brings moto"),
        ("import pytest", "pytest comes with an extra only"),
        ("import s3fs", "s3fs comes with an extra only"),
        ("try:\n    from s3fs import core\nexcept ImportError: ...", "s3fs comes with an extra only"),
        ("class A:\n    import botocore", "botocore comes with an extra only"),
    ],
)
def test_an_import_that_nothing_declares_is_found(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "shardckpt").mkdir()
    (tmp_path / "shardckpt/a.py").write_text(text)
    (found,) = problems(sources(tmp_path, "shardckpt"), PLANTED)
    assert said in found


@pytest.mark.parametrize(
    "text",
    [
        "import os, torch.nn\nfrom __future__ import annotations\nfrom shardckpt import errors",
        "def f():\n    import s3fs\n    from botocore import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import s3fs",
    ],
)
def test_declared_imports_are_let_pass(tmp_path: Path, text: str) -> None:
    (tmp_path / "shardckpt").mkdir()
    (tmp_path / "shardckpt/a.py").write_text(text)
    assert problems(sources(tmp_path, "shardckpt"), PLANTED) == []


def test_what_our_set_ups_install_is_pinned() -> None:
    """By name and exact version, for every Python."""
    pins = re.findall(r"^([\w.-]+)==[\w.]+(?:; .*)?$", (ROOT / "docker/constraints.txt").read_text(), re.MULTILINE)
    extras = PROJECT["optional-dependencies"]
    wanted = [re.split(r"[^\w.-]", name)[0] for name in PROJECT["dependencies"] + extras["test"] + extras["s3"]]
    normal = {name.lower().replace("_", "-") for name in pins}
    assert [name for name in wanted if name.lower().replace("_", "-") not in normal] == []
