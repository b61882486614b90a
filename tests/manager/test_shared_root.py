"""A root that is not one place for all ranks is found out when they first look there, and at each save."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.manager.sharing.check import check_shared
from shardckpt.manager.sharing.sites import Site, far_sites, site_of
from shardckpt.storage.base import Buffer, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.objects.probe import is_probe
from shardckpt.storage.wrapping import Operation, StorageWrapper
from shardckpt.testing.gangs import run_ranks, run_ranks_settled

RANKS = 4
LONG = timedelta(seconds=30)


class Watched(StorageWrapper):
    """Notes what is done; `refused`: an operation that this rank may not do."""

    def __init__(self, inner: Storage, done: list[str], refused: str = "") -> None:
        super().__init__(inner)
        self._done, self._refused = done, refused

    def around(self, operation: Operation, call: Callable[[], Any]) -> Any:
        self._done.append(operation.name)
        if operation.name == self._refused:
            raise PermissionError(f"{operation.name} of {operation.key}: not allowed")
        return call()


def state() -> dict[str, Any]:
    return {"model": {"w": torch.ones(3)}}


def first_look(roots: Callable[[int], Any], tmp_path: Path) -> list[Any]:
    """What the ranks get to see, each with its own root."""

    def act(gangs: sc.Gangs) -> Any:
        with sc.CheckpointManager(roots(gangs.root.rank), gangs, timeout=LONG) as checkpoints:
            return checkpoints.steps()

    return run_ranks_settled(RANKS, act)


def nothing_lies_in(*folders: Path) -> bool:
    return not any(list(folder.iterdir()) for folder in folders if folder.exists())


def test_a_path_that_differs_is_found_out_and_nothing_is_left(tmp_path: Path) -> None:
    """As where each rank puts the time into the name of the run."""
    here, there = tmp_path / "run_10:59:59", tmp_path / "run_11:00:00"
    errors = first_look(lambda rank: there if rank == 2 else here, tmp_path)
    assert [type(error) for error in errors] == [sc.RootNotSharedError] * RANKS
    (text,) = {str(error) for error in errors}
    assert "rank 2 (on " in text
    assert str(here) in text
    assert nothing_lies_in(here)
    assert not there.exists()


def test_what_has_two_names_is_one_place(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "also").symlink_to(tmp_path / "run")
    assert first_look(lambda rank: tmp_path / ("also" if rank % 2 else "run"), tmp_path) == [[]] * RANKS
    assert nothing_lies_in(tmp_path / "run")


def test_the_error_comes_again_and_a_save_fails_as_well(tmp_path: Path) -> None:
    def act(gangs: sc.Gangs) -> Any:
        with sc.CheckpointManager(tmp_path / str(gangs.root.rank // 2), gangs, timeout=LONG) as checkpoints:
            for _ in range(2):
                with pytest.raises(sc.RootNotSharedError, match=r"ranks 2-3 \(on "):
                    checkpoints.resume(state())
            with pytest.raises(sc.CheckpointSaveError, match=r"rank [23]: RootNotSharedError"):
                checkpoints.save(1, state()).result()
        return True

    assert run_ranks(RANKS, act) == [True] * RANKS
    for folder in ("0", "1"):
        assert sc.CheckpointManager(tmp_path / folder, sc.Gangs.local()).steps() == []
        assert nothing_lies_in(tmp_path / folder)


def test_a_save_finds_it_out_by_itself(tmp_path: Path) -> None:
    """Where nobody has looked before; or what was mounted on a node is no longer."""

    def act(gangs: sc.Gangs) -> Any:
        place = tmp_path / ("run" if gangs.root.rank != 3 else "elsewhere")
        checkpoints = sc.CheckpointManager(place, gangs, timeout=LONG)
        with checkpoints, pytest.raises(sc.CheckpointSaveError, match="rank 3: RootNotSharedError: what rank 0 has"):
            checkpoints.save(1, state()).result()
        return True

    assert run_ranks(RANKS, act) == [True] * RANKS
    assert nothing_lies_in(tmp_path / "run", tmp_path / "elsewhere")


@pytest.mark.parametrize("make", [MemoryStorage, MemoryObjects])
def test_one_site_and_object_stores_are_asked_nothing(make: Callable[[], Storage]) -> None:
    place, done = make(), list[str]()
    run_ranks(RANKS, lambda gangs: _in_conversation(gangs, Watched(place, done)))
    assert done == []


def _in_conversation(gangs: sc.Gangs, storage: Storage) -> None:
    gangs.root.enter("look", timeout=LONG)
    check_shared(gangs.root, storage, timeout=LONG)


def on_two_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 2 and 3 are on another machine."""
    real = site_of
    monkeypatch.setattr(
        "shardckpt.manager.sharing.check.site_of",
        lambda storage: Site("far", "b") if storage.rank > 1 else real(storage),
    )


class Ranked(Watched):
    """Knows the rank that uses it."""

    def __init__(self, inner: Storage, done: list[str], refused: str = "", rank: int = 0) -> None:
        super().__init__(inner, done, refused)
        self.rank = rank


def look_from_two_sites(
    folders: Callable[[int], Path], refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[str]], list[Any]]:
    on_two_sites(monkeypatch)
    done: list[list[str]] = [[] for _ in range(RANKS)]

    def act(gangs: sc.Gangs) -> None:
        rank = gangs.root.rank
        _in_conversation(gangs, Ranked(LocalStorage(folders(rank)), done[rank], refused(rank), rank))

    return done, run_ranks_settled(RANKS, act)


def test_one_rank_of_each_other_node_looks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, errors = look_from_two_sites(lambda rank: tmp_path, lambda rank: "", monkeypatch)
    assert errors == [None] * RANKS
    assert done == [["put", "delete"], [], ["put"], []]
    assert nothing_lies_in(tmp_path)


def test_a_rank_that_may_only_read_looks_for_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, errors = look_from_two_sites(lambda rank: tmp_path, lambda rank: "put" if rank else "", monkeypatch)
    assert (errors, done[2]) == ([None] * RANKS, ["put", "size"])
    assert nothing_lies_in(tmp_path)


@pytest.mark.parametrize("shared", [True, False])
def test_where_rank_0_may_only_read_a_record_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    (tmp_path / "other").mkdir()
    with sc.CheckpointManager(tmp_path / "run", sc.Gangs.local()) as checkpoints:
        checkpoints.save(1, state())
    folders = (lambda rank: tmp_path / "run") if shared else (lambda rank: tmp_path / ("other" if rank > 1 else "run"))
    done, errors = look_from_two_sites(folders, lambda rank: "put", monkeypatch)
    assert [type(error) for error in errors] == [type(None) if shared else sc.RootNotSharedError] * RANKS
    assert done[2] == ["read"]
    assert done[1] == done[3] == []


def test_an_empty_root_that_may_only_be_read_is_nobodys_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert look_from_two_sites(lambda rank: tmp_path, lambda rank: "put", monkeypatch)[1] == [None] * RANKS


def test_two_jobs_look_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_two_sites(monkeypatch)
    together = threading.Barrier(2 * RANKS)

    class Meeting(Ranked):
        def put(self, key: str, parts: Iterable[Buffer]) -> int:
            nbytes = super().put(key, parts)
            assert is_probe(key)
            return nbytes

    def job(gangs: sc.Gangs) -> None:
        together.wait(20)
        _in_conversation(gangs, Meeting(LocalStorage(tmp_path), [], "", gangs.root.rank))

    jobs = [threading.Thread(target=lambda: results.append(run_ranks_settled(RANKS, job))) for _ in range(2)]
    results: list[Any] = []
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join(60)
    assert results == [[None] * RANKS] * 2
    assert nothing_lies_in(tmp_path)


def test_what_makes_a_site(tmp_path: Path) -> None:
    local = site_of(LocalStorage(tmp_path))
    assert site_of(Watched(LocalStorage(tmp_path), [])) == local
    assert site_of(LocalStorage(tmp_path / "run")).place != local.place
    assert far_sites([local, Site("b", "b"), local, Site("c", "c"), Site("b", "b")]) == {1: [1, 4], 3: [3]}
