"""What a person sees: commands in a terminal of tmux, 80 and 200 columns wide."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import shardckpt as sc
from tests.tools.making import save

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed: apt-get install tmux")

NAME = "model." + "a_module_with_a_long_name." * 4 + "weight"


class Terminal:
    """A detached terminal of that many columns, driven as a person would."""

    def __init__(self, socket: Path, columns: int) -> None:
        self._socket, self._columns = socket, columns

    def show(self, *commands: Sequence[str]) -> tuple[list[str], str]:
        """The lines on the screen once all of these have ended, those that the terminal broke as one; and painted."""
        run = "; ".join(shlex.join([sys.executable, "-m", "shardckpt", *command]) for command in commands)
        done = shlex.join(["tmux", "-S", str(self._socket), "wait-for", "-S", "done"])
        size = ("-x", str(self._columns), "-y", "120")
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, f"{run}; {done}; exec cat")
        self._tmux("wait-for", "done")
        joined = self._tmux("capture-pane", "-p", "-J", "-S", "-").rstrip().splitlines()
        return [line.rstrip() for line in joined], self._tmux("capture-pane", "-p", "-e", "-S", "-")

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-S", str(self._socket), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, columns: int):
        terminal = cls(folder / "tmux", columns)
        try:
            yield terminal
        finally:
            subprocess.run(["tmux", "-S", str(folder / "tmux"), "kill-server"], check=False, capture_output=True)


@pytest.mark.parametrize("columns", [80, 200])
def test_nothing_is_broken_by_the_terminal(tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    run, name = tmp_path / "run", NAME.removeprefix("model.")
    save(run, 1)
    with sc.CheckpointManager(run) as checkpoints:
        checkpoints.save(
            2, {"model": {name: torch.zeros(2)}, "a_part_of_its_own": 1, "another_part_of_its_own": 2}
        ).result()
    commands = [["ls", str(run)], ["inspect", str(run)], ["verify", "--quick", str(run)]]
    with Terminal.opened(tmp_path, columns) as terminal:
        lines, painted = terminal.show(*[["--help"]][columns == 200 :], *commands)
    too_wide = [line for line in lines if len(line) > columns]
    assert not too_wide, too_wide
    heads = [line.split() for line in lines]
    for head in ("step age size ranks score state parts", "tensor dtype shape placement size"):
        assert head.split() in heads
    assert "\x1b[1m" in painted  # heads are bold
    assert re.search(r"\x1b\[3[23]m(COMPLETE|PARTIAL)", painted)
    whole = [line for line in lines if NAME in line]
    assert bool(whole) == (columns == 200)  # on 80 it is folded, and nothing of it is lost
    assert NAME in re.sub(r" |float32 +2 +- +8 B", "", "".join(lines))
    assert max(map(len, lines)) > 70
