"""While training: one line in the log for each save, on rank 0, with what it cost; and nothing on the screen."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

import shardckpt as sc
from tests.tools.making import small_state


def test_a_save_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    with caplog.at_level(logging.INFO, "shardckpt"), sc.CheckpointManager(tmp_path, keep=sc.KeepLast(1)) as manager:
        for step in (1, 2):
            manager.save(step, small_state(step)).result()
    lines = [record.getMessage() for record in caplog.records if "committed" in record.getMessage()]
    cost = r"committed: \d+\.\d\d GB in \d+\.\d\d s \(\d+\.\d\d GB/s\), training held for \d+\.\d{3} s"
    assert re.fullmatch(f"step 1 {cost}", lines[0])
    assert re.fullmatch(rf"step 2 {cost}, deleted steps \[1\]", lines[1])
    assert len(lines) == 2
    assert {record.name.partition(".")[0] for record in caplog.records} == {"shardckpt"}
    assert capfd.readouterr() == ("", "")
