"""Object stores: a job dies between any two requests, and what was not answered has happened, or not, or comes late."""

from __future__ import annotations

import pytest

from shardckpt.testing.crash.requests import left
from tests.crash.acts import ACTS
from tests.crash.ours import reader_of
from tests.crash.requested import BEFORE, CASES, come_last, record, try_left
from tests.scorecard import Scale, Scorecard

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(("name", "ranks"), CASES)
@pytest.mark.sampled(2)
def test_after_any_request(name: str, ranks: int, scale: Scale, scorecard: Scorecard) -> None:
    place, width = record(name, ranks), ACTS[name].width
    lefts = left(place.events, count=scale.runs(sample=60, full=2000), seed=1, before=BEFORE)
    recoveries = scale.runs(sample=8, full=2000)
    tried = try_left(lefts, reader_of(ranks, width=width), width=width, recoveries=recoveries)
    findings = tried.findings
    scorecard.add(
        "crash states of object stores",
        runs=tried.states,
        torn=findings["torn"],
        lost=findings["lost"] + findings["back"],
        outside=findings["outside"],
    )
    assert not findings, tried.first


@pytest.mark.parametrize("name", ["same step again", "delete, keep model"])
def test_a_record_that_comes_late_replaces_nothing(name: str) -> None:
    """The last request of a dead job, for a record in the place of another, comes when that step was saved anew."""
    place, tried = record(name, 1), 0
    for each in left(place.events, count=60, seed=1, before=BEFORE):
        if any(request.kind == "swap" for request in each.late):
            assert come_last(each, reader_of(1), width=ACTS[name].width) == []
            tried += 1
    assert tried
