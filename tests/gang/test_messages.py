"""Rank 0's verdict on a meeting: a pure function of who came, from where, and with what behind them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.gang.wire.messages import Arrival, History, Verdict, decode, encode, judge, ranks_text


def verdict_on(*arrivals: tuple[str, tuple[str, ...]] | None) -> Verdict:
    came = {rank: Arrival(*arrival) for rank, arrival in enumerate(arrivals) if arrival is not None}
    return judge(came, conversation="c", gang="root", size=len(arrivals), waited_s=60.0)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "rank 3"), ([2, 0, 1], "ranks 0-2"), ([7, 0, 1, 5, 6], "ranks 0-1, 5-7"), ([1, 1], "rank 1")],
)
def test_ranks_are_named_in_spans(numbers: list[int], text: str) -> None:
    assert ranks_text(numbers) == text


def test_all_in_one_scope_is_well() -> None:
    verdict = verdict_on(("a", ()), ("a", ("x",)), ("a", ("a",)))
    assert verdict.ok
    assert all(verdict.is_over_for(rank) for rank in range(3))


def test_who_did_not_come_is_absent_for_all() -> None:
    verdict = verdict_on(("a", ()), None, ("a", ()))
    assert verdict.absent == (1,)
    assert verdict.text == "gang 'root': rank 1 did not come to scope 'a' within 60 s"
    assert all(verdict.is_over_for(rank) for rank in range(3))


def test_where_nobody_is_known_to_be_behind_all_give_up() -> None:
    verdict = verdict_on(("a", ()), ("b", ()))
    assert not verdict.ok
    assert verdict.leave == (0, 1)
    assert "rank 0 is in scope 'a' while rank 1 is in scope 'b'" in verdict.text


def test_who_is_in_a_scope_that_another_has_left_is_behind_and_the_others_wait() -> None:
    verdict = verdict_on(("save/2", ("save/1",)), ("save/3", ("save/2",)), ("save/2", ()))
    assert verdict.leave == (0, 2)
    assert [verdict.is_over_for(rank) for rank in range(3)] == [True, False, True]


def test_a_scope_that_is_entered_again_does_not_make_its_ranks_behind() -> None:
    assert verdict_on(("list", ("list", "list")), ("list", ("list",))).ok


def test_history_forgets_what_is_long_ago() -> None:
    history = History()
    for number in range(100):
        arrival = history.arrive(str(number))
    assert arrival.past == tuple(str(number) for number in range(91, 99))


def test_what_was_skipped_is_past_once_and_pushes_nothing_out_later() -> None:
    """Whoever has skipped something says so at every meeting."""
    history, skipped = History(), [f"hung {number}" for number in range(8)]
    assert history.arrive("0", skipped[:1]).past == ("hung 0",)
    assert history.arrive("1", skipped).past == ("0", *skipped[1:])
    for number in range(2, 12):
        past = history.arrive(str(number), skipped).past
    assert past == tuple(map(str, range(3, 11)))


scopes = st.sampled_from(["a", "b", "c"])
arrivals = st.one_of(st.none(), st.tuples(scopes, st.lists(scopes, max_size=3).map(tuple)))


@given(st.tuples(scopes, st.lists(scopes, max_size=3).map(tuple)), st.lists(arrivals, max_size=5))
def test_a_verdict_is_final_for_somebody_and_travels_unchanged(
    first: tuple[str, tuple[str, ...]], others: list[tuple[str, tuple[str, ...]] | None]
) -> None:
    verdict = verdict_on(first, *others)
    came = [rank for rank, arrival in enumerate([first, *others]) if arrival is not None]
    assert any(verdict.is_over_for(rank) for rank in came), "or they would meet for ever"
    assert verdict.ok == (len(came) == len(others) + 1 and len({a[0] for a in [first, *others] if a}) == 1)
    assert Verdict.from_json(decode(encode(verdict.to_json()))) == verdict
