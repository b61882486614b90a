"""The examples run, stop at a step and go on from it when they are run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house.source import ROOT
from tests.integrations.forks import Forks
from tests.integrations.huggingface import jobs

pytestmark = pytest.mark.xdist_group("huggingface")


@pytest.mark.parametrize(("name", "world_size"), [("huggingface.py", 1), ("hf_accelerate.py", 2)])
def test_an_example_goes_on_where_it_stopped(forks: Forks, tmp_path: Path, name: str, world_size: int) -> None:
    program = ROOT / "launch" / name
    first = forks.run(world_size, jobs.program, program, [str(tmp_path / "out"), "20"], preload=jobs.PRELOAD)
    assert "at step 20 " in first[0]
    assert "resumed" not in first[0]
    second = forks.run(world_size, jobs.program, program, [str(tmp_path / "out"), "40"])
    assert "at step 40 (resumed at 20)" in second[0]
