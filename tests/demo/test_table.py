import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from shardckpt.demo.messages import Mesh, Resumed, Saved, Writing
from shardckpt.demo.table import Leftover, Record, Results, judge, largest_difference, render

KILL_AT, EVERY, LAST = 16, 4, 24


def good_results() -> Results:
    """What a show finds when all is well."""
    losses = {step: 5.0 - step / 7 for step in range(1, LAST + 1)}
    after = {step: loss for step, loss in losses.items() if step > KILL_AT - EVERY}
    here, there = Mesh(2, 2), Mesh(1, 2)
    resumed = Resumed(step=12, committed=[4, 8, 12], skipped=[(14, "a byte of rank_0.pt differs")], elapsed_s=0.5)
    writing = Writing(step=KILL_AT, key="step_16.0123456789abcdef0123.tmp/rank_3.pt")
    saves = [Saved("interrupted", step, 40_000_000, 0.01, 0.02, 0.1, 0.02, 0.2) for step in (4, 8, 12)]
    return Results(
        reference=Record(here, dict(losses)),
        interrupted=Record(here, {s: x for s, x in losses.items() if s <= 17}, saves, stalled=writing),
        resumed=[
            Record(here, dict(after), resumed=resumed, committed=(4, 8, 12)),
            Record(
                there,
                {step: loss + 1e-6 for step, loss in after.items()},
                resumed=resumed,
                committed=(4, 8, 12, 16, 20, 24),
            ),
        ],
        kill_at=KILL_AT,
        save_every=EVERY,
        last_step=LAST,
        tolerance=1e-4,
        leftover=Leftover("step_16.0123456789abcdef0123.tmp", {f"rank_{r}.pt": 10_000_000 for r in range(4)}),
    )


def failing(results: Results) -> list[str]:
    return [check.claim for check in judge(results) if not check.holds]


def test_all_holds_when_all_is_well():
    assert failing(good_results()) == []


def one_bit_off(results: Results) -> None:
    losses = results.resumed[0].losses
    losses[24] = math.nextafter(losses[24], 9.0)


def beyond_tolerance(results: Results) -> None:
    results.resumed[1].losses[20] += 2e-4


def not_a_number(results: Results) -> None:
    results.resumed[1].losses[20] = math.nan


def a_step_is_missing(results: Results) -> None:
    del results.resumed[0].losses[13]


def started_afresh(results: Results) -> None:
    results.resumed[0].resumed = None


def resumed_the_killed_step(results: Results) -> None:
    results.resumed[1].resumed = Resumed(step=16, committed=[4, 8, 12, 16], skipped=[], elapsed_s=0.5)


def resumed_an_older_step(results: Results) -> None:
    results.resumed[1].resumed = Resumed(step=8, committed=[4, 8, 12], skipped=[], elapsed_s=0.5)


def saving_changed_the_training(results: Results) -> None:
    losses = results.interrupted.losses
    losses[5] = math.nextafter(losses[5], 9.0)


def nobody_was_killed(results: Results) -> None:
    results.interrupted.committed = (4, 8, 12, 16, 20, 24)


def training_stood_still(results: Results) -> None:
    del results.interrupted.losses[17]


def a_later_save_is_missing(results: Results) -> None:
    results.resumed[1].committed = (4, 8, 12, 20, 24)


@pytest.mark.parametrize(
    ("tamper", "claim"),
    [
        (one_bit_off, "dp 2 x tp 2: losses equal the uninterrupted run's"),
        (beyond_tolerance, "dp 1 x tp 2: losses agree within 0.0001"),
        (not_a_number, "dp 1 x tp 2: losses agree within 0.0001"),
        (a_step_is_missing, "dp 2 x tp 2: trained to the end"),
        (started_afresh, "dp 2 x tp 2: resumes step 12; 16 is not there"),
        (resumed_the_killed_step, "dp 1 x tp 2: resumes step 12; 16 is not there"),
        (resumed_an_older_step, "dp 1 x tp 2: resumes step 12; 16 is not there"),
        (saving_changed_the_training, "saving does not change the training"),
        (nobody_was_killed, "killed while step 16 was written; training went on"),
        (training_stood_still, "killed while step 16 was written; training went on"),
        (a_later_save_is_missing, "dp 1 x tp 2: saves on, step 16 again"),
    ],
)
def test_whatever_is_wrong_is_noticed_and_nothing_else_is_blamed(tamper: Callable[[Results], None], claim: str):
    results = good_results()
    tamper(results)
    assert claim in failing(results)
    assert len(failing(results)) <= 2


@pytest.mark.parametrize("leftover", [None, Leftover("step_16", {"manifest.json": 900})])
def test_a_killed_save_that_left_nothing_or_a_record_is_noticed(leftover):
    assert failing(replace(good_results(), leftover=leftover)) == ["killed while step 16 was written; training went on"]


def test_the_largest_difference_knows_no_mercy():
    assert largest_difference({1: 2.0, 2: 3.0}, {1: 2.5, 2: 3.25}) == 0.5
    assert largest_difference({3: 1.0}, {1: 1.0}) == math.inf
    assert largest_difference({}, {1: 1.0}) == math.inf


@pytest.mark.parametrize("meshes", [[Mesh(2, 2), Mesh(1, 2)], [Mesh(2, 2), Mesh(1, 2), Mesh(16, 16), Mesh(1, 1)]])
def test_a_person_reads_it_at_80_columns(meshes):
    good = good_results()
    records = [replace_mesh(good.resumed[min(i, 1)], mesh) for i, mesh in enumerate(meshes)]
    results = replace(good, resumed=records)
    text = render(results, judge(results))
    assert max(map(len, text.splitlines())) <= 80
    assert "skipped step 14: a byte of rank_0.pt differs" in text
    assert "resumed on dp 1 x tp 2: step 12" in text
    assert text.count("resumed 1x2 ") == 1


def replace_mesh(record: Record, mesh: Mesh) -> Record:
    return replace(record, mesh=mesh)


def test_the_slowest_rank_counts_and_the_bytes_are_those_of_all():
    results = good_results()
    fast = results.interrupted.saves[0]
    results.interrupted.saves.append(replace(fast, total_s=0.4, stall_s=0.015))
    line = next(line for line in render(results, []).splitlines() if line.startswith("on 2x2"))
    assert " ".join(line.split()) == "on 2x2 4 15 20 100 20 400 40.0 100"
