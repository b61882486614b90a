"""The command line: what it offers, and that the demo gets all of its arguments."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version

import pytest
from typer.testing import CliRunner

import shardckpt.demo.__main__
from shardckpt.cli.commands import app
from shardckpt.cli.main import main


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"shardckpt {version('shardckpt')}\n")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_the_commands(option: str) -> None:
    result = CliRunner().invoke(app, [option])
    assert result.exit_code == 0
    assert "demo" in result.output


def test_an_unknown_command_is_a_usage_error() -> None:
    assert CliRunner().invoke(app, ["nonsense"]).exit_code == 2


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--mesh", "2x2", "--keep", "x", "-q", "y"]])
def test_the_demo_gets_its_arguments_as_they_are(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []

    def record(given: Sequence[str]) -> int:
        got.append(list(given))
        return 3

    monkeypatch.setattr(shardckpt.demo.__main__, "main", record)
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert got == [arguments]
    assert result.exit_code == 3


def test_the_installed_command_and_the_module_are_the_same() -> None:
    (command,) = entry_points(group="console_scripts", name="shardckpt")
    assert command.load() is main
    told = subprocess.run(
        [sys.executable, "-m", "shardckpt", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert told.stdout == f"shardckpt {version('shardckpt')}\n"
