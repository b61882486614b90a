"""The benchmark with Trainer, on a model as small as can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import huggingface
from tests.integrations.forks import Forks
from tests.integrations.huggingface import jobs

pytestmark = pytest.mark.xdist_group("huggingface")


def turns_and_comparison(rank: int, world_size: int, shared: Path, folder: Path) -> list[dict[str, float]]:
    huggingface._WIDTH = 16
    job = {"mb": 0, "steps": 2, "every": 1}
    seen = [
        huggingface._turn({**job, "way": way, "folder": str(folder / f"0_{number}")})
        for number, way in enumerate(huggingface.WAYS)
    ]
    huggingface._compare(folder, 2)
    return seen


@pytest.mark.larger
def test_each_turn_measures_and_the_checkpoints_are_compared(forks: Forks, tmp_path: Path) -> None:
    (seen,) = forks.run(1, turns_and_comparison, tmp_path, preload=jobs.PRELOAD)
    table = huggingface.render(
        {"mb": 1, "steps": 2, "every": 1}, {way: [turn] for way, turn in zip(huggingface.WAYS, seen, strict=True)}
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[4:]]
    assert [row[0] for row in rows] == list(huggingface.WAYS)
    assert [bool(row[1]) for row in rows] == [False, True, True, True]
    assert all(row[2] and row[3] for row in rows)
