"""What an import brings along, counted in modules and not in seconds: machines differ, modules do not."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import shardckpt
from tests.house.source import ROOT, imports, sources
from tests.house.storeys import FRAMEWORKS

HEAVY = {"torch", "numpy", "fsspec", "s3fs", "aiohttp", "botocore", "rich", "typer", "multiprocessing", "asyncio"}
"""From 20 ms (typer) to 2 s (torch)."""
HEAVY |= {*FRAMEWORKS}
INTEGRATIONS = [".".join(source.parts) for source in sources(ROOT, "shardckpt/integrations")]


def loaded_by(code: str, *, prints: bool = False) -> set[str]:
    """All modules in a fresh interpreter after `code`, which says nothing, unless it is to print something."""
    told = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json\nprint(json.dumps(list(sys.modules)))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    assert prints or (told.stderr, told.stdout.count("\n")) == ("", 1)
    return set(json.loads(told.stdout.splitlines()[-1]))


def test_the_bare_import_brings_nothing_heavy_and_few_modules_in_all() -> None:
    bare = loaded_by("import shardckpt") - loaded_by("import importlib, typing")
    assert not bare & HEAVY
    assert bare <= {name for name in bare if name.startswith("shardckpt")} | {"__future__"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import shardckpt.errors", HEAVY),
        ("import shardckpt.storage", {"torch", "fsspec", "s3fs"}),
        ("import shardckpt.cli.main", HEAVY),
        ("import shardckpt.cli.commands", HEAVY - {"typer"}),
        ("from shardckpt import CheckpointManager", {"s3fs", "rich", "typer"}),
        ("import shardckpt.testing.pool", {"s3fs", "rich", "typer", "pytest"}),
        (f"import {', '.join(INTEGRATIONS)}", {"s3fs", "rich", "typer", *FRAMEWORKS}),
    ],
)
def test_an_import_leaves_out_what_it_does_not_need(code: str, absent: set[str]) -> None:
    assert not loaded_by(code) & absent


LEAN = {"shardckpt", "typer", "annotated_doc", "shellingham"}
"""Packages of which a command is made. What comes on top is said for each."""
PRETTY = {"rich", "attr", "markdown_it", "mdurl", "pygments"}
SLOW = {"asyncio", "multiprocessing", "statistics", "sqlite3", "http", "ssl", "logging.config"}
"""Of Python's own, what takes milliseconds and is of no use to commands that look."""


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("--help", PRETTY),
        ("--version", set()),
        ("ls {run}", {"isal"}),
        ("prune {run} --keep-last 1", {"isal"}),
        ("verify --quick {run}", {"isal", *PRETTY}),
        ("inspect {run}", {"isal", *PRETTY}),
        ("report {run} --to -", {"isal"}),
        ("unpin {run} --step 1", {"isal"}),
    ],
)
def test_the_command_line_answers_without_torch(command: str, more: set[str], tmp_path: Path) -> None:
    """And starts in a tenth of a second: it brings these packages and no others, and nothing slow of Python's own."""
    (tmp_path / "step_1").mkdir()
    code = f"import runpy, sys\nsys.argv = {['shardckpt', *command.format(run=tmp_path).split()]}\n"
    code += "try: runpy.run_module('shardckpt', run_name='__main__')\nexcept SystemExit: pass\nsys.stdout.flush()"
    loaded = loaded_by(code, prints=True) - loaded_by("pass")
    packages = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert packages <= LEAN | more
    assert not loaded & SLOW
    assert not loaded & HEAVY - {"typer", "rich"}


def test_what_an_import_prints_is_seen() -> None:
    for stream in ("stdout", "stderr"):
        with pytest.raises(AssertionError):
            loaded_by(f"import sys; print('hello', file=sys.{stream})")


def test_a_heavy_import_is_seen() -> None:
    assert "asyncio" in loaded_by("import asyncio") & HEAVY


def test_the_public_face_is_what_it_declares() -> None:
    (face,) = [source for source in sources(ROOT, "shardckpt") if source.parts == ("shardckpt",)]
    declared = {
        name.split(".")[-1]: name.rpartition(".")[0] for _, name in imports(face) if name.startswith("shardckpt.")
    }
    assert declared == {name: f"shardckpt.{home}" for name, home in shardckpt._HOME.items()}
    assert sorted(shardckpt.__all__) == sorted(declared)
    for name in shardckpt.__all__:
        assert getattr(shardckpt, name).__name__ == name
        assert name in dir(shardckpt)


def test_the_version_is_that_of_the_installed_package() -> None:
    assert shardckpt.__version__ == version("shardckpt")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        shardckpt.nonsense  # noqa: B018
