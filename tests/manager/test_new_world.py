"""What counts in terms of its rank, on another number of ranks: dropped, or made anew by a function of the user's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from tests.manager.transactions import Size, equal, on_ranks


class Samples:
    """A sampler: of what was left when this job began, in one order, data-parallel rank r of n takes every n-th.

    In a job of another size it goes on with what no rank of the jobs before has taken, also where some ranks were ahead
    of others: `worlds` has how many samples each rank of each of these jobs took.
    """

    def __init__(self, gangs: sc.Gangs, count: int) -> None:
        self._rank, self._size = gangs.dp.rank, gangs.dp.size
        self.order = torch.arange(count)
        self.worlds: list[list[int]] = []
        self.taken = 0

    def take(self, count: int) -> list[int]:
        left = self.order.tolist()
        for took in self.worlds:
            left = [number for place, number in enumerate(left) if place // len(took) >= took[place % len(took)]]
        mine = left[self._rank :: self._size][self.taken : self.taken + count]
        self.taken += len(mine)
        return mine

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "worlds": self.worlds, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.order, self.worlds, self.taken = state["order"], state["worlds"], state["taken"]


def merge(saved: Sequence[dict[str, Any]], dp_rank: int, dp_size: int) -> dict[str, Any]:
    worlds = [*saved[0]["worlds"], [own["taken"] for own in saved]]
    return {"order": saved[0]["order"], "worlds": worlds, "taken": 0}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("sizes", "ahead"),
    [
        ([Size(2), Size(4), Size(1)], 0),
        ([Size(3), Size(3), Size(2)], 2),
        ([Size(2, 2), Size(4), Size(1, 4), Size(2)], 1),
    ],
    ids=str,
)
def test_no_sample_is_lost_or_repeated(tmp_path: Path, sizes: list[Size], ahead: int, in_place: bool) -> None:
    """Jobs of other sizes go on with one epoch; ranks may be ahead of each other, tensor-parallel ones are not."""
    count = 61
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    policy = sc.LoadPolicy(new_world={"samples": merge}, in_place=in_place)
    seen: Counter[int] = Counter()
    for step, size in enumerate(sizes):

        def act(manager: sc.CheckpointManager, gangs: sc.Gangs, step: int = step, size: Size = size) -> list[int]:
            samples = Samples(gangs, count)
            if step == 0:
                samples.order = order
            else:
                assert manager.resume({"samples": samples}, policy=policy) is not None
            is_last = step == len(sizes) - 1
            mine = samples.take(count if is_last else 2 + ahead * gangs.dp.rank)
            mine += samples.take(0 if is_last else 3)
            manager.save(step, {"samples": samples}).result()
            return mine if gangs.tp.rank == 0 else []

        for mine in on_ranks(size, tmp_path, act):
            seen.update(mine)
    assert seen == Counter(range(count))


class Counts:
    """Says itself what becomes of it in a new world."""

    def __init__(self, number: int) -> None:
        self.number = number

    def new_world(self, saved: Sequence[Mapping[str, int]], dp_rank: int, dp_size: int) -> dict[str, int]:
        total = sum(own["number"] for own in saved)
        return {"number": total // dp_size + (dp_rank < total % dp_size)}

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.number = state["number"]


def save_numbers(root: Path, size: Size, alike: bool = False) -> None:
    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        number = 10 if alike else 10 + gangs.dp.rank
        state = {"counts": Counts(number), "value": number, "tensor": torch.tensor(number), "nested": {"a": [number]}}
        manager.save(1, state).result()

    on_ranks(size, root, act)


def load_numbers(root: Path, size: Size, new_world: Mapping[str, Any]) -> list[Any]:
    """By rank what it holds, or the problems of a load that was refused; the state is then as it was."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> Any:
        state: dict[str, Any] = {"counts": Counts(0), "value": 0, "tensor": torch.tensor(0), "nested": {"a": [0]}}
        try:
            manager.resume(state, policy=sc.LoadPolicy(new_world=new_world))
        except sc.CheckpointLoadError as error:
            same = (state["counts"].number, state["value"], state["tensor"].item()) == (0, 0, 0)
            return f"{error}; state as it was: {same and not error.state_changed}"
        return [state["counts"].number, state["value"], state["tensor"].item(), state["nested"]["a"][0]]

    return on_ranks(size, root, act)


def total(saved: Sequence[int], dp_rank: int, dp_size: int) -> int:
    return 100 * dp_rank + sum(saved)


def first_of(saved: Sequence[list[int]], dp_rank: int, dp_size: int) -> list[int]:
    return saved[0]


def test_a_function_for_values_and_an_object_that_has_its_own(tmp_path: Path) -> None:
    """Of 10 and 11, or of 10 and 10: what all held alike is no less than that what each of them counted."""
    rules = {"value": total, "tensor": "first", "nested": first_of}
    for alike, sums in ((False, 21), (True, 20)):
        root = tmp_path / str(alike)
        save_numbers(root, Size(2), alike)
        thirds = [sums // 3 + (rank < sums % 3) for rank in range(3)]
        expected = [[thirds[rank], 100 * rank + sums, 10, 10] for rank in range(3)]
        equal(load_numbers(root, Size(3), rules), expected)
        own = [10, 10 if alike else 11]
        equal(load_numbers(root, Size(2), rules), [[number] * 4 for number in own])


def test_what_is_dropped_is_what_the_rank_has_now(tmp_path: Path) -> None:
    """Also if all ranks held it alike; on the ranks that saved it, it comes back."""
    for alike in (False, True):
        root = tmp_path / str(alike)
        save_numbers(root, Size(2), alike)
        rules = {"counts": "drop", "value": "drop", "tensor": "drop", "nested": "first"}
        equal(load_numbers(root, Size(3), rules), [[0, 0, 0, 10]] * 3)
        equal(load_numbers(root, Size(2), rules), [[10] * 4, [10 if alike else 11] * 4])


def fail(saved: Sequence[Any], dp_rank: int, dp_size: int) -> Any:
    if dp_rank == 1:
        raise KeyError("position")
    return saved[0]


def test_a_function_that_fails_changes_nothing(tmp_path: Path) -> None:
    save_numbers(tmp_path, Size(2))
    for told in load_numbers(tmp_path, Size(3), {"value": fail, "tensor": "own", "nested": "own"}):
        assert "value: its function of new_world failed: KeyError: 'position'" in told
        assert told.endswith("state as it was: True")


def test_rules_that_cannot_be(tmp_path: Path) -> None:
    save_numbers(tmp_path, Size(2))
    for told in load_numbers(tmp_path, Size(3), {"value": total, "tensor": total, "nested": "own"}):
        assert "per rank: tensor is a Tensor: functions are for objects with state_dict and for Python values" in told
    with pytest.raises(ValueError, match="one of fail, own, first, drop, or a function"):
        sc.LoadPolicy(new_world={"value": "random"})  # type: ignore[dict-item]
