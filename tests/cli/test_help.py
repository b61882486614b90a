"""What commands say of themselves: an example each, status, completion; and the page of what `--json` prints."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from shardckpt.cli.commands import app
from tests.cli.schema import BEGIN, PAGE, REPORTS, described

COMMANDS = {command.name: command for command in typer.main.get_command(app).commands.values()}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_an_example(name: str) -> None:
    assert f"Example: shardckpt {name} " in (COMMANDS[name].help or "")


def test_the_help_says_how_commands_end() -> None:
    told = " ".join(CliRunner().invoke(app, ["--help"], env={"NO_COLOR": "1"}).stdout.split())
    for said in ("0 if all is good", "1 if problems", "2 for wrong", "130 if interrupted", "--install-completion"):
        assert said in told


def test_completion_knows_the_commands() -> None:
    asked = {"_SHARDCKPT_COMPLETE": "complete_bash", "COMP_WORDS": "shardckpt re", "COMP_CWORD": "1"}
    told = subprocess.run(
        [sys.executable, "-m", "shardckpt"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert {"repair", "report"} <= set(told.stdout.split())


def test_the_page_of_what_is_printed_is_up_to_date() -> None:
    assert PAGE.read_text().partition(BEGIN)[2] == f"\n{described()}", "run python -m tests.cli.schema"
    for name in REPORTS:
        assert "--json" in {option for each in COMMANDS[name].params for option in each.opts}
