"""What every gang must do: inherit `GangContract`, or for a gang of several ranks `TeamContract`.

class TestMine(TeamContract):
    @pytest.fixture
    def play(self) -> Play:
        return run_my_ranks    # act(gang, *args) on each of four ranks at once; results in rank order

What the ranks do is in `gang_acts`, so that it can be sent to other processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from shardckpt.testing import gang_acts as acts

Play: TypeAlias = Callable[..., list[Any]]
"""`play(act, *args)` runs `act(gang, *args)` on every rank of a new gang; raises if it raised on any."""


class GangContract:
    """What holds for any number of ranks."""

    @pytest.fixture
    def play(self) -> Play:
        """Override it."""
        raise NotImplementedError("override the fixture `play`")

    def test_ranks_are_numbered(self, play: Play) -> None:
        shown = play(acts.show)
        assert shown == [[rank, len(shown), "root"] for rank in range(len(shown))]

    def test_gather_gives_rank_0_all_values_in_order(self, play: Play) -> None:
        gathered = play(acts.gather_messages)
        expected = [[[rank, message] for rank in range(len(gathered))] for message in acts.MESSAGES]
        assert gathered[0] == expected
        assert gathered[1:] == [[None] * len(acts.MESSAGES)] * (len(gathered) - 1)

    def test_broadcast_gives_all_ranks_what_rank_0_gave(self, play: Play) -> None:
        for heard in play(acts.broadcast_messages):
            assert heard == [["from", 0, message] for message in acts.MESSAGES]

    def test_messages_are_json_and_nothing_else(self, play: Play) -> None:
        for refused, sent_on in play(acts.send_bytes):
            assert refused == "TypeError"
            assert sent_on == [1, [2]]

    def test_an_operation_outside_of_a_scope_is_refused(self, play: Play) -> None:
        for refusals in play(acts.act_outside):
            assert [refusal["kind"] for refusal in refusals] == ["GangError"] * 3
            assert all("enter()" in refusal["text"] for refusal in refusals)

    def test_scopes_follow_each_other(self, play: Play) -> None:
        told = play(acts.enter_many)
        assert all(words == [f"{k} {i}" for k in range(5) for i in range(3)] for words in told)

    def test_together_returns_each_rank_its_own_result(self, play: Play) -> None:
        results = play(acts.work_well)
        assert [own for own, _ in results] == [{rank} for rank in range(len(results))]
        assert results[0][1] == [rank * rank for rank in range(len(results))]
        assert all(gathered is None for _, gathered in results[1:])

    def test_together_fails_on_all_ranks_when_one_raises(self, play: Play) -> None:
        results = play(acts.fail_on_last)
        last = len(results) - 1
        for rank, (error, after) in enumerate(results):
            assert error["text"] == results[0][0]["text"]
            assert f"write of step 7 failed on gang 'root' of {last + 1}: rank {last}: OSError: disk" in error["text"]
            assert "in raise_disk_full" in error["text"], "the traceback of the rank that failed"
            assert error["failures"] == {last: ["OSError", "disk full"]}
            assert error["absent"] == ()
            assert error["step"] == 7
            assert error["cause"] == ("OSError" if rank == last else None)
            assert error["took_s"] < acts.ENOUGH_S
            assert after == ["next", last + 1]

    def test_what_is_not_json_fails_together_gather_on_all_ranks(self, play: Play) -> None:
        for error, after in play(acts.gather_bytes):
            assert error["failures"][0][0] == "TypeError"
            assert after[0] == "next"

    def test_an_interrupt_goes_on_where_it_happened_and_is_told_to_the_others(self, play: Play) -> None:
        results = play(acts.interrupt_last)
        for error, _ in results[:-1]:
            assert error["failures"] == {len(results) - 1: ["Interrupted", "ctrl-c"]}
            assert error["took_s"] < acts.ENOUGH_S
        assert results[-1][0]["kind"] == "Interrupted"
        assert all(after == ["next", len(results)] for _, after in results)

    def test_subgangs(self, play: Play) -> None:
        results = play(acts.use_subgangs)
        size = len(results)
        assert results == [([0, 1], [rank, size], [size - 1 - rank, size]) for rank in range(size)]

    def test_close_may_be_called_twice(self, play: Play) -> None:
        assert all(refusal["kind"] == "GangError" for refusal in play(acts.close_twice))


class TeamContract(GangContract):
    """What holds for several ranks: `play` must run four."""

    def test_enter_is_a_barrier(self, play: Play, tmp_path: Path) -> None:
        assert play(acts.count_arrivals, tmp_path) == [4, 4, 4, 4]

    def test_subgangs_of_some(self, play: Play) -> None:
        assert play(acts.use_halves) == [[0, 2], [1, 2], [0, 2], [1, 2]]

    @pytest.mark.parametrize("absent", [2, 0])
    def test_a_rank_that_does_not_come_is_named(self, play: Play, tmp_path: Path, absent: int) -> None:
        results = play(acts.stay_away, absent, tmp_path)
        present = [result for rank, result in enumerate(results) if rank != absent]
        assert all(error["absent"] == (absent,) for error, _ in present)
        assert all(f"rank {absent} " in error["text"] for error, _ in present)
        assert len({error["text"] for error, _ in present}) == 1 or absent == 0
        assert all(error["took_s"] < acts.ENOUGH_S for error, _ in present)
        assert all(after == ["next", 4] for _, after in results)

    def test_a_rank_that_comes_late_hears_so_at_once(self, play: Play, tmp_path: Path) -> None:
        results = play(acts.come_late, 1, tmp_path)
        assert all(error["absent"] == (1,) for error, _ in results)
        assert len({error["text"] for error, _ in results}) == 1
        assert results[1][0]["took_s"] < acts.ENOUGH_S, "its own timeout is long"
        assert all(after == ["next", 4] for _, after in results)

    def test_a_scope_that_nobody_else_enters_fails_everywhere_at_once(self, play: Play) -> None:
        results = play(acts.enter_elsewhere, 3)
        for error, _ in results:
            assert "ranks 0-2 are in scope 'save/1' while rank 3 is in scope 'load/1'" in error["text"]
            assert error["took_s"] < acts.ENOUGH_S
        assert all(after == ["next", 4] for _, after in results)

    @pytest.mark.parametrize("ahead", [2, 0])
    def test_a_rank_that_is_one_scope_ahead_is_caught_up_with(self, play: Play, ahead: int) -> None:
        """As after an error on one rank before it came to the meeting: not every later meeting may fail for it."""
        for entered in play(acts.run_ahead, ahead):
            assert entered == "scope 3"

    @pytest.mark.parametrize("ahead", [2, 0])
    def test_a_rank_that_says_what_it_skipped_meets_the_others_in_the_next_scope(self, play: Play, ahead: int) -> None:
        for entered in play(acts.run_ahead, ahead, ["scope 1"]):
            assert entered == "scope 2"

    def test_gather_gives_what_came_when_a_rank_is_missing(self, play: Play, tmp_path: Path) -> None:
        results = play(acts.miss_a_gather, 1, tmp_path)
        absent, values = results[0][0]
        assert absent == (1,)
        assert values == {0: "value 0", 2: "value 2", 3: "value 3"}
        assert [told for told, _ in results[1:]] == ["it is over"] * 3
        assert all(after == ["next", 4] for _, after in results)

    def test_together_names_who_failed_and_who_did_not_answer(self, play: Play, tmp_path: Path) -> None:
        results = play(acts.fail_and_hang, tmp_path)
        for error, _ in results:
            assert error["failures"] == {1: ["ValueError", "x" * 20], 3: ["ValueError", "x" * 20]}
            assert error["absent"] == (2,)
            assert error["text"] == results[0][0]["text"]
            assert error["took_s"] < acts.ENOUGH_S
        assert all(after == ["next", 4] for _, after in results)

    def test_rank_0_that_takes_too_long_does_not_succeed_alone(self, play: Play, tmp_path: Path) -> None:
        results = play(acts.overrun, tmp_path)
        assert results[0][0]["failures"][0][0] == "TimeoutError"
        assert all(error["absent"] == (0,) for error, _ in results[1:])
        assert all(after == ["next", 4] for _, after in results)
