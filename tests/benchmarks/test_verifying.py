"""The benchmark of `verify`: a round of a small step, and what it prints."""

from __future__ import annotations

from pathlib import Path

from benchmarks import verifying


def test_a_round_of_a_small_step(tmp_path: Path) -> None:
    files = verifying.prepare(tmp_path, 4_000_000)
    assert len(files) == 2
    seconds = verifying.one_round(tmp_path, files)
    assert list(seconds) == list(verifying.WAYS)
    told = verifying.render(4_000_000, [seconds]).splitlines()
    assert [line.split("|")[1].strip() for line in told[4:]] == list(verifying.WAYS)


def test_the_ratio_is_that_to_the_better_bare_read() -> None:
    seconds = dict(zip(verifying.WAYS, (4.0, 2.0, 2.5, 1.0, 2.0), strict=True))
    assert (verifying.ratio([seconds], "verify, cold"), verifying.ratio([seconds], "verify, warm")) == (0.8, 0.5)
