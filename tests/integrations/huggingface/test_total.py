"""`save_total_limit` as a policy."""

from __future__ import annotations

import pytest

from shardckpt.integrations.huggingface.total import KeepTotal
from shardckpt.run.retention import StepFacts


@pytest.mark.parametrize(
    ("limit", "bests", "kept"),
    [
        (None, [2], [1, 2, 3, 4]),
        (0, [], [1, 2, 3, 4]),
        (2, [], [3, 4]),
        (2, [1], [1, 4]),
        (3, [1], [1, 3, 4]),
        (1, [4], [4]),
        (1, [2], [2, 4]),
        (2, [1, 9], [1, 4]),  # the new best is not committed: the one before stays
        (2, [1, 2, 9], [2, 4]),
        (9, [1], [1, 2, 3, 4]),
    ],
)
def test_so_many_stay_the_last_and_the_best_among_them(limit: int | None, bests: list[int], kept: list[int]) -> None:
    assert sorted(KeepTotal(limit, bests).keep([StepFacts(step) for step in (1, 2, 3, 4)])) == kept
