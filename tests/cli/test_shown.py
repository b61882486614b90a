"""Every command, as text and as data, to the letter: on runs that are sound, partial, damaged, foreign; local, on S3.

`python -m tests.cli.shown` writes anew what is held against; a change shows in its diff. The suite takes a part of it,
`--scale full` all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from shardckpt.cli.commands import app
from tests.cli.shown import STATES, WITHOUT_JSON, commands, golden, sections, shown, staged
from tests.scorecard import Scale
from tests.storage.conftest import s3
from tests.storage.s3server import S3Server

__all__ = ["s3"]  # fixtures


@pytest.mark.parametrize("state", STATES)
def test_what_is_shown(state: str, tmp_path: Path, scale: Scale) -> None:
    check(state, "local", tmp_path, None, one_in=max(1, 2 // scale.runs(sample=1, full=2)))


@pytest.mark.parametrize("state", STATES)
def test_what_is_shown_of_runs_on_s3(state: str, tmp_path: Path, s3: S3Server, scale: Scale) -> None:
    check(state, "s3", tmp_path, s3, one_in=max(1, 4 // scale.runs(sample=1, full=4)))


def check(state: str, kind: str, scratch: Path, server: S3Server | None, *, one_in: int) -> None:
    """Of so many commands one takes its turn: as text in one state, as data in another."""
    known, turn = golden(kind, state).read_text().split("\n\n$"), list(STATES).index(state)
    assert len(known) == len(sections(state))
    with staged(kind, state, scratch / "place", server) as stage:
        for number, (command, text) in enumerate(zip(sections(state), known, strict=True)):
            if command[0] in WITHOUT_JSON or (number + turn) % one_in == 0:
                told = shown(stage, command)
                assert told.strip("$\n") == text.strip("$\n"), "python -m tests.cli.shown writes it anew"


def test_no_command_is_left_out() -> None:
    named = {command[0] for command in commands("sound")}
    assert named == typer.main.get_command(app).commands.keys() - {"demo"}  # which has tests of its own
