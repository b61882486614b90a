"""Exports by several ranks: to the last byte what one process writes, whole or not there, and the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt as sc
from shardckpt.engine.saving import share
from shardckpt.errors import (
    CheckpointDamagedError,
    CheckpointLoadError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    GangError,
)
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.open import open_storage
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.testing.faults import FailingStorage, RecordingStorage, flip_byte, on
from shardckpt.testing.gangs import run_ranks, run_ranks_settled

MIB = 1 << 20
RANKS = 4


def save_in_pieces(root: Path) -> None:
    """10 MB on two tensor-parallel ranks: cut by rows, by columns, tied, of several widths, one that fits no page."""
    torch.manual_seed(0)
    wholes = {
        "rows": torch.randn(1280, 1024),
        "columns": torch.randn(512, 1026),
        "narrow": torch.randn(512, 1024).to(torch.bfloat16),
        "one": torch.tensor(3, dtype=torch.int64),
        "last": torch.randn(400, 1000),
    }
    (root / "cc").mkdir(parents=True)
    (root / "cc/config.json").write_text('{"model_type": "of its own"}')

    def save(gangs: sc.Gangs) -> None:
        dims = {"rows": 0, "columns": 1, "narrow": 1, "last": 0}
        model = nn.ParameterDict()
        for name, tensor in wholes.items():
            own = tensor.chunk(2, dims[name])[gangs.tp.rank].contiguous() if name in dims else tensor
            model[name] = nn.Parameter(own, requires_grad=own.is_floating_point())
        model["tied"] = model["rows"]
        with sc.CheckpointManager(root, gangs) as manager:
            manager.save(1, {"model": sc.TensorSplit(model, {**dims, "tied": 0})}).result()

    run_ranks(2, save, tp=2)


@pytest.fixture(autouse=True)
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are shared, too."""
    monkeypatch.setattr(share, "LEAST", 2 * MIB)
    monkeypatch.setattr(share, "LEAST_OF_UPLOAD", 2 * MIB)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    save_in_pieces(root)
    return root


def jointly(run: Any, to: Callable[[], Any], *, ranks: int = RANKS, **options: Any) -> list[Any]:
    """What each rank gets, or raises."""
    read = [0] * ranks

    def act(gangs: sc.Gangs) -> Any:
        def told(step: int, nbytes: int, total: int) -> None:
            read[gangs.root.rank] += nbytes

        means = sc.Means(budget_nbytes=8 * MIB, gangs=gangs, told=told, timeout=timedelta(seconds=30))
        report = sc.export(run() if callable(run) else run, to(), means=means, **options)
        return report, read[gangs.root.rank]

    return run_ranks_settled(ranks, act)


def files_of(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name in storage.list()}


FORMS: dict[str, dict[str, Any]] = {
    "one file": {},
    "several": {"max_file_nbytes": 3_000_000},
    "rounded": {"dtype": "bfloat16"},
    "pt": {"form": "pt"},
    "pt, rounded": {"form": "pt", "dtype": "float16"},
}


@pytest.mark.parametrize("place", ["folder", "objects", "memory", "url"])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_to_the_last_byte_what_one_process_writes(run: Path, tmp_path: Path, place: str, form: str) -> None:
    options = FORMS[form]
    alone = sc.export(run, tmp_path / "alone", **options)
    url = f"memory://{tmp_path.name}/out"
    where: Any = {"objects": MemoryObjects(), "memory": MemoryStorage(), "url": url}.get(place, tmp_path / "out")
    found = jointly(run, lambda: where, **options)
    assert [outcome[0] for outcome in found] == [alone] * RANKS
    with_name = where if not isinstance(where, (str, Path)) else open_storage(where)
    assert files_of(with_name) == files_of(open_storage(tmp_path / "alone"))
    assert sorted(path.name for path in tmp_path.iterdir()) == (["alone", "out"] if place == "folder" else ["alone"])
    passes = 2 if form == "pt, rounded" else 1
    assert sum(nbytes for _, nbytes in found) >= alone.nbytes * passes - 8  # "one" is not rounded
    if place in ("folder", "objects"):  # where ranks share files
        assert max(nbytes for _, nbytes in found) < alone.nbytes * passes * 0.5 + 2 * MIB


def test_each_rank_writes_its_part_of_one_file(run: Path, tmp_path: Path) -> None:
    places: list[Any] = []

    def to() -> Any:
        places.append(RecordingStorage(objects))
        return places[-1]

    objects = MemoryObjects()
    jointly(run, to)
    puts = [[op.key for op in place.operations if op.name == "put_parts"] for place in places]
    assert puts == [["model.safetensors"]] * RANKS
    report = jointly(run, lambda: tmp_path / "a.safetensors")[2][0]
    assert (report.copied, [path.name for path in tmp_path.iterdir()]) == ((), ["a.safetensors"])
    assert (tmp_path / "a.safetensors").read_bytes() == objects.read("model.safetensors")


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("where", ["folder", "objects"])
def test_damage_that_no_rank_sees_alone_is_found_by_all(tmp_path: Path, form: Any, where: str) -> None:
    """A tensor whose rows several ranks read, each some."""
    large = torch.arange(2_500_000.0)
    with sc.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"model": {"w": large}}).result()
    flip_byte(tmp_path / "run/step_1/model.pt", 6_000_000)
    to: Any = MemoryObjects() if where == "objects" else tmp_path / "out"
    found = jointly(tmp_path / "run", lambda: to, form=form)
    assert [type(error) for error in found] == [CheckpointDamagedError] * RANKS
    assert all("model.pt" in str(error) for error in found)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert where != "objects" or (to.list(), to.list_uploads()) == ([], [])


class Fickle(StorageWrapper):
    """Gives one byte wrong, the first time that it is read."""

    wrong = True

    def read_into(self, reads: Any) -> None:
        self.inner.read_into(reads)
        for read in reads:
            if self.wrong and read.key.endswith(".pt") and len(read.into) > MIB // 4:
                self.wrong = False
                read.into[7] ^= 0x80  # a sign, which no rounding takes away


def test_what_is_not_the_same_when_it_is_read_again(run: Path, tmp_path: Path) -> None:
    """For its sum, and for its bytes."""
    storage = Fickle(open_storage(run))
    found = jointly(storage, lambda: tmp_path / "out", form="pt", dtype="float16")
    assert [type(error) for error in found] == [CheckpointDamagedError] * RANKS
    assert "was read twice, and was not the same" in str(found[0])
    assert list(tmp_path.iterdir()) == []


def test_one_fails_all_know_and_nothing_is_left(run: Path, tmp_path: Path) -> None:
    for name, form in (("put_parts", "safetensors"), ("finish_upload", "pt"), ("put", "safetensors")):
        objects = MemoryObjects()
        turns = iter(range(RANKS))

        def to(name: str = name, objects: Any = objects, turns: Any = turns) -> Any:
            return FailingStorage(objects, on(name)) if name != "put_parts" or next(turns) == 2 else objects

        found = jointly(run, to, form=form)
        assert [type(error) for error in found] == [CheckpointSaveError] * RANKS, found
        assert (objects.list(), objects.list_uploads()) == ([], [])
    (tmp_path / "out").mkdir()
    for error in jointly(run, lambda: tmp_path / "out"):
        assert isinstance(error, CheckpointSaveError)
        assert "is there already: name another" in str(error)
    for error in jointly(run, lambda: tmp_path / "new", part="ema"):
        assert isinstance(error, CheckpointNotFoundError)
    taken = MemoryObjects()
    taken.put("mine", [b"x"])
    assert {type(error) for error in jointly(run, lambda: taken)} == {CheckpointSaveError}
    assert taken.list() == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("nth", [1, 3, 4])
def test_one_that_cannot_read_is_known_to_all(run: Path, tmp_path: Path, nth: int) -> None:
    """An index, how things are nested, bytes of tensors."""
    turns = iter(range(RANKS))

    def source() -> Storage:
        storage: Storage = open_storage(run)
        return FailingStorage(storage, on("read_into"), nth=nth) if next(turns) == 2 else storage

    found = jointly(source, lambda: tmp_path / "out")
    assert [type(error) for error in found] == [CheckpointLoadError] * RANKS, found
    assert all("injected" in str(error) for error in found)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_does_not_come(run: Path, tmp_path: Path) -> None:
    def act(gangs: sc.Gangs) -> None:
        if gangs.root.rank != 1:
            sc.export(run, tmp_path / "out", means=sc.Means(gangs=gangs, timeout=timedelta(seconds=1)))

    found = run_ranks_settled(3, act)
    assert [type(outcome) for outcome in found] == [GangError, type(None), GangError]
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_by_one_process_says_so(run: Path, tmp_path: Path) -> None:
    def act(gangs: sc.Gangs) -> None:
        means = sc.Means(gangs=gangs)
        with pytest.raises(ValueError, match="convert is done by one process"):
            sc.convert(run, tmp_path / "a", means=means)
        with pytest.raises(ValueError, match="average is done by one process"):
            sc.average([run], tmp_path / "a", means=means)

    run_ranks(2, act)
