"""The rules of the house hold for this repository, and each is seen to find a violation."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.house import docs, names, sizes, storeys
from tests.house.source import ROOT, Source, sources

Tree = Mapping[str, str]


def plant(folder: Path, tree: Tree) -> list[Source]:
    for path, text in tree.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return sources(folder, "shardckpt", "tests")


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are tracked")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listing.split("\0") if name]


def lines(count: int, *, inside: str = "") -> str:
    return inside + "    x = 1\n" * count if inside else "x = 1\n" * count


def test_imports_go_down_only() -> None:
    assert storeys.problems(sources(ROOT, "shardckpt")) == []


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("gang/a.py", "import shardckpt.storage.base", "gang must not import storage"),
        ("storage/a.py", "from shardckpt.gang import base", "storage must not import gang"),
        ("format/a.py", "from shardckpt.engine.save import Saver", "format must not import engine"),
        ("format/a.py", "from ..storage import base", "format must not import storage"),
        ("format/__init__.py", "from ..storage import base", "format must not import storage"),
        ("engine/saving/a.py", "from ...run.catalog import Catalog", "engine must not import run"),
        ("engine/a.py", "def f():\n    from shardckpt import manager", "engine must not import manager"),
        ("run/a.py", "from shardckpt.engine import save", "run must not import engine"),
        ("errors.py", "from shardckpt.state import Part", "errors must not import state"),
        ("tools/a.py", "import shardckpt.cli.main", "tools must not import cli"),
        ("engine/a.py", "from shardckpt import CheckpointManager", "engine must not import the public face"),
        ("engine/a.py", "import shardckpt", "engine must not import the public face"),
        ("attic/a.py", "import os", "'attic' has no place in the house"),
        ("storage/a.py", "import torch.distributed as dist", "torch.distributed is for"),
        ("storage/a.py", "from torch import distributed", "torch.distributed is for"),
        ("run/a.py", "import torch\ntorch.distributed.barrier()", "torch.distributed is for"),
        ("engine/a.py", "def f():\n    from fsspec.spec import AbstractFileSystem", "fsspec is for"),
        ("engine/a.py", "import os\nx = os.environ['RANK']", "os.environ is for"),
        ("gang/store.py", "from os import environ", "os.environ is for"),
        ("storage/a.py", "import os\nx = os.getenv('HOME')", "os.getenv is for"),
        ("manager.py", "import rich.table", "rich is for"),
        ("tools/a.py", "def f():\n    from transformers import Trainer", "transformers is for"),
        ("manager/a.py", "from shardckpt.integrations import frameworks", "manager must not import integrations"),
    ],
)
def test_an_import_that_goes_up_is_found(tmp_path: Path, path: str, text: str, said: str) -> None:
    found = storeys.problems(plant(tmp_path, {f"shardckpt/{path}": text}))
    assert found
    assert all(said in problem and path in problem for problem in found), found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("gang/a.py", "from shardckpt.errors import GangError\nfrom shardckpt.gang.base import Gang\nimport os.path"),
        ("gang/gangs.py", "import os\nimport torch.distributed\nx = os.environ"),
        ("engine/a.py", "from shardckpt.gang.base import Gang\nfrom shardckpt import __version__"),
        ("cli/a.py", "import shardckpt as sc\nimport typer\nfrom shardckpt.demo.job import run"),
        ("__init__.py", "from shardckpt.manager import CheckpointManager"),
    ],
)
def test_imports_that_go_down_are_let_pass(tmp_path: Path, path: str, text: str) -> None:
    assert storeys.problems(plant(tmp_path, {f"shardckpt/{path}": text})) == []


def test_nothing_is_too_long() -> None:
    assert sizes.problems(sources(ROOT, *(name for name in sizes.FILE_LINES if (ROOT / name).is_dir()))) == []


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"shardckpt/a.py": lines(301)}, "a.py: 301 lines, at most 300"),
        ({"tests/a.py": lines(501)}, "a.py: 501 lines, at most 500"),
        ({"shardckpt/a.py": lines(60, inside="def f():\n")}, "f has 61 lines, at most 60"),
        ({"shardckpt/a.py": lines(60, inside="async def f():\n")}, "f has 61 lines"),
        ({f"shardckpt/run/{letter}.py": "" for letter in "abcdefghij"}, "shardckpt/run: 10 files, at most 9"),
        ({"shardckpt/run/utils.py": ""}, "the name 'utils' says nothing"),
        ({"shardckpt/common/a.py": ""}, "the name 'common' says nothing"),
        ({"shardckpt/a.py": "def f(a, b, *, c, d, e, f, g, h, i): ..."}, "f takes 9 parameters, at most 8"),
        ({"shardckpt/a.py": "class A:\n  def f(self, *, a, b, c, d, e, f, g, h, **i): ..."}, "A.f takes 9 parameters"),
        (
            {"shardckpt/__init__.py": "from shardckpt.a import f", "shardckpt/a.py": "def f(a, b, c): ..."},
            "f takes 3 positional",
        ),
        (
            {
                "shardckpt/__init__.py": "from shardckpt.a import A",
                "shardckpt/a.py": "class A:\n  @classmethod\n  def f(cls, a, b, c=1): ...",
            },
            "A.f takes 3 positional",
        ),
    ],
)
def test_what_is_too_long_is_found(tmp_path: Path, tree: Tree, said: str) -> None:
    (found,) = sizes.problems(plant(tmp_path, tree))
    assert said in found


@pytest.mark.parametrize(
    "tree",
    [
        {"shardckpt/a.py": lines(300), "tests/a.py": lines(500)},
        {"shardckpt/a.py": lines(59, inside="def f():\n")},
        {f"shardckpt/run/{name}.py": "" for name in [*"abcdefghi", "__init__"]},
        {"shardckpt/__init__.py": "from shardckpt.a import A", "shardckpt/a.py": "class A:\n  def f(self, a, b): ..."},
        {"shardckpt/a.py": "def internal(a, b, c): ..."},
    ],
)
def test_what_just_fits_is_let_pass(tmp_path: Path, tree: Tree) -> None:
    assert sizes.problems(plant(tmp_path, tree)) == []


def test_no_file_names_the_machine_it_was_written_on() -> None:
    assert names.problems(ROOT, tracked_files()) == []


@pytest.mark.parametrize(
    "words",  # in pieces, or this file would be found
    [
        ["see ", "work", "main"],
        ["python = '", "root", ".pyenv", "x'"],
        ["https:", "", "pypi" + chr(46) + "org", "simple"],
        ["--find-links ", "opt", "wheels", ""],
    ],
)
def test_a_name_of_the_machine_is_found(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "a.md").write_text("fine: s3://bucket/work/root/ and path/work/x\n" + "/".join(words))
    (found,) = names.problems(tmp_path, ["a.md", "gone.md"])
    assert found.startswith("a.md:2: ")


def test_every_example_says_how_it_is_kept_true() -> None:
    assert docs.problems(ROOT, *(name for name in tracked_files() if name.endswith(".md"))) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nx = 1\n```\n", "a.md:1: say"),
        ("\n<!-- x.py -->\n```python\nx = 2\n```\n", "a.md:3: differs from what is x.py"),
        ("<!-- in x.py -->\n```python\nx = 2\n```\n", "differs from what is in x.py"),
        ("<!-- gone.py -->\n```python\nx = 1\n```\n", "differs from what is gone.py"),
    ],
)
def test_an_example_that_nothing_keeps_true_is_found(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.py").write_text("x = 1\n")
    (tmp_path / "a.md").write_text(text)
    (found,) = docs.problems(tmp_path, "a.md")
    assert said in found


def test_marked_examples_are_let_pass(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("x = 1\ny = 2\n")
    marked = {"x.py": "x = 1\ny = 2\n", "in x.py": "y = 2\n", "run": "1 / 1\n", "sketch": "...\n"}
    (tmp_path / "a.md").write_text("\n".join(f"<!-- {mark} -->\n\n```python\n{marked[mark]}```\n" for mark in marked))
    assert docs.problems(tmp_path, "a.md") == []
    assert {example.mark: example.code for example in docs.examples(tmp_path, "a.md")} == marked
