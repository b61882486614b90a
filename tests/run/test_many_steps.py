"""What a run of very many steps costs: requests for what is shown, kept or deleted, and none for what is only there."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import islice
from pathlib import Path

import pytest
import torch

import shardckpt as sc
from shardckpt.run.catalog import Catalog
from shardckpt.run.history import History
from shardckpt.run.leftovers import DeadAttempts
from shardckpt.run.prune import retain
from shardckpt.run.retention import KeepAll, KeepEvery, KeepLast
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.wrapping import Operation, StorageWrapper
from shardckpt.testing.faults import RecordingStorage
from shardckpt.tools.listing import list_checkpoints
from tests.run.making import commit, start_attempt

FEW, MANY = 18, 36


def storages(disk: Path | None = None) -> list[tuple[Storage, Storage]]:
    """Of each kind one with few steps and one with many."""
    made: list[tuple[Storage, Storage]] = [
        (MemoryStorage("few"), MemoryStorage("many")),
        (MemoryObjects("few"), MemoryObjects("many")),
    ]
    if disk is not None:
        made.append((LocalStorage(disk / "few"), LocalStorage(disk / "many")))
    for few, many in made:
        for storage, count in ((few, FEW), (many, MANY)):
            for step in range(count):
                commit(storage, step)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Storage, Storage]]:
    """For questions that change nothing."""
    return storages(tmp_path_factory.mktemp("runs"))


def requests(storage: Storage, question: Callable[[Storage], object]) -> int:
    recording = RecordingStorage(storage)
    question(recording)
    return len(recording.operations)


@pytest.mark.parametrize(
    ("question", "at_most"),
    [
        (lambda storage: Catalog(storage).latest(), 2),
        (lambda storage: list(islice(Catalog(storage).newest_first(), 3)), 2 + 16),
        (lambda storage: list(islice(Catalog(storage).full_steps(), 1)), 3),
        (lambda storage: Catalog(storage).has(7), 1),
        (lambda storage: Catalog(storage).has(None), 2),
        (lambda storage: retain(Catalog(storage), KeepAll()), 0),
        (lambda storage: retain(Catalog(storage), KeepLast(2) | KeepAll()), 0),
        (lambda storage: History(Catalog(storage), KeepAll(), grace=timedelta(hours=1)).retain(KeepAll()), 0),
        (lambda storage: list_checkpoints(storage, last=3), 2 + 16 + 3 * 2 + 1 + 3),
    ],
)
def test_no_question_asks_about_steps_that_it_does_not_need(
    question: Callable[[Storage], object], at_most: int, made: list[tuple[Storage, Storage]]
) -> None:
    for few, many in made:
        assert requests(few, question) == requests(many, question) <= at_most


def test_to_list_all_costs_a_request_for_each_and_one(made: list[tuple[Storage, Storage]]) -> None:
    for few, many in made:
        assert requests(few, lambda storage: Catalog(storage).steps()) == FEW + 1
        assert requests(many, lambda storage: Catalog(storage).steps()) == MANY + 1


def test_to_prune_one_costs_a_request_for_each_that_is_kept() -> None:
    """And what its deletion takes."""
    for few, many in storages():
        spent = {}
        for storage, count in ((few, FEW), (many, MANY)):
            commit(storage, count)
            policy = KeepLast(count)
            spent[count] = requests(storage, lambda storage: retain(Catalog(storage), policy))  # noqa: B023 (called at once)
            assert Catalog(storage).steps()[0] == 1
        assert spent[MANY] - spent[FEW] == MANY - FEW


def test_to_look_for_the_leftovers_of_dead_jobs_costs_a_request_for_each_step_in_sixteen_looks() -> None:
    objects, now = MemoryObjects("many"), [0.0]
    for step in range(320):
        commit(objects, step)
    recording = RecordingStorage(objects)
    dead = DeadAttempts(Catalog(recording), grace=timedelta(seconds=4), clock=lambda: now[0])
    spent = []
    for _ in range(49):
        before = len(recording.operations)
        dead.tidy()
        spent.append(len(recording.operations) - before)
        now[0] += 1
    own = 2  # the root, and the uploads
    assert spent[0] == 320 + own
    assert sum(spent[1:17]) == sum(spent[17:33]) == sum(spent[33:49]) == 320 + 16 * own
    assert max(spent[1:]) < 320 / 4, "not all in the same look"


def test_a_dead_attempt_beside_a_step_that_was_tidy_is_found_in_the_end() -> None:
    objects, now = MemoryObjects("run"), [0.0]
    for step in range(3):
        commit(objects, step)
    dead = DeadAttempts(Catalog(objects), grace=timedelta(seconds=4), clock=lambda: now[0])
    dead.tidy()
    folder = start_attempt(objects, 1, "0" * 20)
    swept = list[str]()
    for _ in range(40):
        now[0] += 1
        swept += dead.tidy()
    assert swept == [folder]
    assert Catalog(objects).steps() == [0, 1, 2]


class Looks(StorageWrapper):
    """Counts which steps are looked at, in whatever way."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.steps = set[str]()

    def around(self, operation: Operation, call: Callable[[], object]) -> object:  # type: ignore[override]
        self.steps |= {key.partition("/")[0] for key in operation.keys if key.startswith("step_")}
        return call()


@pytest.mark.parametrize("kind", [MemoryStorage, MemoryObjects])
def test_a_job_that_resumes_and_saves_looks_at_its_own_steps_alone(
    kind: type[MemoryStorage] | type[MemoryObjects],
) -> None:
    storage = kind("run")
    model = torch.nn.Linear(2, 2)
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.save(100, {"model": model})
    for step in range(50):
        commit(storage, step)
    looks = Looks(storage)
    assert isinstance(looks, RenamingStorage) == isinstance(storage, RenamingStorage)
    with sc.CheckpointManager(looks) as checkpoints:
        resumed = checkpoints.resume({"model": model})
        assert resumed is not None
        assert resumed.step == checkpoints.latest() == 100
        assert checkpoints.load_last_checkpoint()[0] == 100
        assert checkpoints.has_checkpoint(100)
        looked = set(looks.steps)
    assert looked == {"step_100"}


def test_a_policy_that_keeps_every_second_asks_about_those_alone() -> None:
    for _, many in storages():
        gone = retain(Catalog(many), KeepEvery(steps=2))
        assert len(gone) == MANY // 2 - 1, "the newest stays"
        assert requests(many, lambda storage: retain(Catalog(storage), KeepEvery(steps=2))) <= MANY // 2 + 4


@pytest.mark.parametrize("make", [MemoryStorage, MemoryObjects])
@pytest.mark.parametrize("ask", [lambda catalog: catalog.steps()[-1], lambda catalog: catalog.latest().step])
def test_steps_that_are_pruned_while_one_looks_do_not_hide_newer_ones(
    make: Callable[[str], Storage], ask: Callable[[Catalog], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process saves and prunes on after each listing; step 10 is pinned, so it is always there."""
    storage = make("run")
    for step in (10, 20):
        commit(storage, step)
    listed, turns = storage.list, iter([(20, 30), (30, 40), (40, 50)])

    def list_and_go_on(prefix: str = "") -> list[str]:
        names = listed(prefix)
        if not prefix and (turn := next(turns, None)) is not None:
            commit(storage, turn[1])
            storage.delete_tree(f"step_{turn[0]}")
        return names

    monkeypatch.setattr(storage, "list", list_and_go_on)
    assert ask(Catalog(storage)) == 50
