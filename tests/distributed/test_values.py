"""Python values and plain tensors that differ between ranks: whose they are when the ranks are others."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shardckpt as sc
from tests.distributed.jobs import Layout, checkpoints

SAVED, FRESH = 0, 500
"""Added to what a rank holds before the save, and before the load."""


class Loader:
    """A data loader's position: its own on every rank, with a tensor and a value that are alike on all."""

    def __init__(self, position: int) -> None:
        self.position, self.epoch, self.order = position, 1, torch.arange(4)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "shard": {"position": self.position}, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self.order = state["epoch"], state["shard"]["position"], state["order"]


def state_of(rank: int, base: int) -> dict[str, Any]:
    """Rank r holds numbers that begin with r, in every form that a program may hold them; the rest is alike."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(base + rank)
    return {
        "loader": Loader(base + rank),
        "note": f"{base + rank}",
        "nested": {"cache": torch.full((3,), base + rank), "list": [base + rank, {"deep": (base + rank,)}]},
        "rng": sc.RngState(),
        "alike": {"step": 7, "names": ["a", "b"], "table": torch.eye(2)},
    }


def numbers(state: dict[str, Any]) -> dict[str, Any]:
    """What `state_of` made of one rank's numbers, as plain values; takes three numbers from the random streams."""
    return {
        "loader": (state["loader"].position, state["loader"].epoch, state["loader"].order.tolist()),
        "note": state["note"],
        "cache": state["nested"]["cache"].tolist(),
        "list": state["nested"]["list"],
        "rng": (torch.rand(1).item(), random.random(), float(np.random.rand())),
        "alike": (state["alike"]["step"], state["alike"]["names"], state["alike"]["table"].tolist()),
    }


def expected(rank: int, base: int = SAVED) -> dict[str, Any]:
    return numbers(state_of(rank, base))


def save(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> None:
    with checkpoints(root, layout.mesh()) as manager:
        manager.save(1, state_of(rank, SAVED)).result()


def load(
    rank: int, world_size: int, folder: Path, root: Path, layout: Layout, new_world: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What this rank holds after a load into fresh values, and the problems if it was refused."""
    state, problems = state_of(rank, FRESH), []
    with checkpoints(root, layout.mesh()) as manager:
        try:
            assert manager.resume(state, policy=sc.LoadPolicy(new_world=new_world)) is not None
        except sc.CheckpointMismatchError as error:
            problems = list(error.problems)
    return numbers(state), problems


@pytest.mark.parametrize("layout", [Layout(4), Layout(2, 2), Layout(1, 4)], ids=str)
def test_every_rank_gets_its_own_back(ranks, tmp_path, layout):
    ranks.run(4, save, tmp_path, layout)
    for rank, (found, problems) in enumerate(ranks.run(4, load, tmp_path, layout, {})):
        assert not problems
        assert found == expected(rank)


@pytest.mark.parametrize(
    ("before", "after"), [(Layout(4), Layout(2)), (Layout(2), Layout(4)), (Layout(4), Layout(2, 2))]
)
def test_values_of_other_ranks_are_asked_for(ranks, tmp_path, before, after):
    """A rank's values mean nothing on another mesh, unless someone says so: one error for all, and nothing loaded."""
    ranks.run(before.ranks, save, tmp_path, before)
    for rank, (found, problems) in enumerate(ranks.run(after.ranks, load, tmp_path, after, {})):
        assert found == expected(rank, FRESH)
        text = "\n".join(problems)
        for key in ("loader.shard.position", "note", "nested.list", "nested.cache"):
            assert f"per rank: {key}" in text
            assert f"new_world={{'{key.split('.')[0]}': 'own', 'first', 'drop' or a function}}" in text
        assert f"each of {before.ranks} ranks" in text
        assert "alike" not in text
        assert "rng" not in text


OWN = {"loader": "own", "note": "own", "nested": "own"}
FIRST = {"loader": "first", "note": "first", "nested": "first"}


def test_own_on_fewer_ranks(ranks, tmp_path):
    ranks.run(4, save, tmp_path, Layout(4))
    for rank, (found, problems) in enumerate(ranks.run(2, load, tmp_path, Layout(2), OWN)):
        assert not problems
        assert found == expected(rank)


def test_own_on_more_ranks(ranks, tmp_path):
    """Who has no counterpart keeps what it has, of all that differed; what was alike it gets."""
    ranks.run(2, save, tmp_path, Layout(2))
    for rank, (found, problems) in enumerate(ranks.run(4, load, tmp_path, Layout(4), OWN)):
        assert not problems
        assert found == (expected(rank) if rank < 2 else {**expected(rank, FRESH), "alike": expected(0)["alike"]})


def test_first_on_more_ranks(ranks, tmp_path):
    """The streams of random numbers go by their own rule: a rank without a counterpart keeps its own."""
    ranks.run(2, save, tmp_path, Layout(2))
    for rank, (found, problems) in enumerate(ranks.run(4, load, tmp_path, Layout(4), FIRST)):
        assert not problems
        assert found == {**expected(0), "rng": expected(rank, SAVED if rank < 2 else FRESH)["rng"]}


def test_first_for_random_streams(ranks, tmp_path):
    ranks.run(2, save, tmp_path, Layout(2))
    outcomes = ranks.run(4, load, tmp_path, Layout(4), {**FIRST, "rng": "first"})
    assert [found for found, _ in outcomes] == [expected(0)] * 4


@pytest.mark.parametrize("after", [Layout(1), Layout(2), Layout(1, 4), Layout(4)], ids=str)
def test_values_that_are_alike_load_on_any_ranks(ranks, tmp_path, after):
    ranks.run(4, save_alike, tmp_path)
    assert ranks.run(after.ranks, load_alike, tmp_path, after) == [[3, [3.0, 3.0], "3"]] * after.ranks


def save_alike(rank: int, world_size: int, folder: Path, root: Path) -> None:
    with checkpoints(root, Layout(2, 2).mesh()) as manager:
        manager.save(1, {"loader": Loader(3), "plain": torch.full((2,), 3.0), "note": "3"}).result()


def load_alike(rank: int, world_size: int, folder: Path, root: Path, layout: Layout) -> list[Any]:
    state: dict[str, Any] = {"loader": Loader(0), "plain": torch.zeros(2), "note": ""}
    with checkpoints(root, layout.mesh()) as manager:
        manager.resume(state)
    return [state["loader"].position, state["plain"].tolist(), state["note"]]


class Words:
    """Counts of words: a dict whose keys are each rank's own, and tensors of each rank's own shape."""

    def __init__(self, rank: int, base: int) -> None:
        self.state = {f"word {base + rank}": 1, "all": 2, f"table {rank}": torch.full((rank + 1,), base + rank)}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


def save_words(rank: int, world_size: int, folder: Path, root: Path) -> None:
    with checkpoints(root, Layout(world_size).mesh()) as manager:
        state = {"words": Words(rank, SAVED), "buffer": torch.full((rank + 1,), float(rank)), "alike": 1}
        manager.save(1, state).result()


def load_words(
    rank: int, world_size: int, folder: Path, root: Path, rule: str | None, buffer: list[int]
) -> tuple[list[str], list[str], list[float]]:
    """(problems, keys of the words, the buffer), for buffers of these lengths."""
    words, held = Words(rank, FRESH), torch.full((buffer[rank],), 9.0)
    policy = sc.LoadPolicy(new_world=dict.fromkeys(("words", "buffer"), rule) if rule else {})  # type: ignore[arg-type]
    problems: list[str] = []
    with checkpoints(root, Layout(world_size).mesh()) as manager:
        try:
            manager.resume({"words": words, "buffer": held, "alike": 0}, policy=policy)
        except sc.CheckpointMismatchError as error:
            problems = list(error.problems)
    return problems, list(words.state), held.tolist()


def test_keys_and_shapes_that_differ(ranks, tmp_path):
    """A key that only one rank has differs, too, although there is nothing that it differs from."""
    ranks.run(2, save_words, tmp_path)
    own = [["word 0", "all", "table 0"], ["word 1", "all", "table 1"]]
    same = ranks.run(2, load_words, tmp_path, None, [1, 2])
    assert same == [([], own[0], [0.0]), ([], own[1], [1.0, 1.0])]
    for problems, words, buffer in ranks.run(3, load_words, tmp_path, None, [1, 2, 3]):
        named = [problem.split(" was saved")[0] for problem in problems]
        assert named == ["per rank: words.table 0", "per rank: buffer"]
        assert "by only 1 of 2 ranks" in problems[0]
        assert words[0].startswith("word 50")
        assert set(buffer) == {9.0}
    mine = ranks.run(3, load_words, tmp_path, "own", [1, 2, 3])
    assert mine == [([], own[0], [0.0]), ([], own[1], [1.0, 1.0]), ([], ["word 502", "all", "table 2"], [9.0] * 3)]
    assert ranks.run(3, load_words, tmp_path, "first", [1, 1, 1]) == [([], own[0], [0.0])] * 3
