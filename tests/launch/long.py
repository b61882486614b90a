"""What takes minutes, or packages that the suite does not need: run by `launch/check.sh`, which brings them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ASKED = "SHARDCKPT_TEST_LAUNCH"
asked_for = pytest.mark.skipif(ASKED not in os.environ, reason=f"{ASKED} is not set: bash launch/check.sh runs them")

PATIENCE_S = 420.0
"""Of each wait, on a machine that is busy."""


def wait_until(true: Callable[[], object], what: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > deadline:
            said = log.read_text()[-4000:] if log is not None and log.exists() else ""
            raise AssertionError(f"after {PATIENCE_S:g} s: not {what}\n{said}")
        time.sleep(0.1)


def committed(root: Path) -> list[int]:
    """The steps that are there, in order; attempts, whose names go on, are none."""
    numbers = [record.parent.name.removeprefix("step_") for record in root.glob("step_*/manifest.json")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def steps(text: str) -> list[int]:
    """Those that the training has printed."""
    return [int(number) for number in re.findall(r"^(?:\S+ )?step (\d+) loss", text, re.MULTILINE)]


def resumed_at(text: str) -> list[int]:
    """Where its lives went on, without repetitions."""
    found = [int(number) for number in re.findall(r"\(resumed at (\d+)\)", text)]
    return [number for i, number in enumerate(found) if i == 0 or found[i - 1] != number]
