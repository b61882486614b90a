"""Repair: what it makes loads bit for bit, nothing is deleted, nothing is offered that is not proven to be whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.format.layout import aside_folder
from shardckpt.format.manifest import decode_manifest
from shardckpt.run.catalog import Catalog
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.faults import FailingStorage, flip_byte, on
from shardckpt.tools.repairing.mend import mend_record
from tests.manager.transactions import Size, equal, files_in, on_ranks, state_of
from tests.run.making import walk
from tests.tools.making import assert_loads, save, save_on


@pytest.fixture(params=["file system", "object store"])
def storage(request: pytest.FixtureRequest) -> Storage:
    return MemoryStorage("run") if request.param == "file system" else MemoryObjects("run")


def content(storage: Storage) -> dict[str, bytes]:
    return {key: storage.read(key) for key in walk(storage)}


def assert_loads_on(size: Size, root: Any, step: int) -> None:
    """Every rank gets back what it gave."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        equal(manager.load_checkpoint(step), state_of(gangs, ("model",), base=step))

    on_ranks(size, root, act)


def test_a_sound_step_needs_nothing(storage: Storage) -> None:
    save(storage, 1)
    before = content(storage)
    report = sc.repair(storage, step=1, apply=True)
    assert (report.kind, report.applied) == ("nothing", False)
    assert content(storage) == before


def test_a_flipped_bit_of_a_record_is_mended_exactly(storage: Storage) -> None:
    save(storage, 1)
    record = storage.read("step_1/manifest.json")
    for at, bit in ((50, 3), (len(record) - 40, 0), (len(record) - 78, 6), (len(record) // 2, 7)):
        damaged = bytes([*record[:at], record[at] ^ 1 << bit, *record[at + 1 :]])
        storage.replace("step_1/manifest.json", damaged)
        assert not sc.verify(storage).ok
        assert sc.repair(storage, step=1).kind == "mend record"
        assert storage.read("step_1/manifest.json") == damaged
        report = sc.repair(storage, step=1, apply=True)
        assert report.after is not None
        assert report.after.verdict == "COMPLETE"
        assert storage.read("step_1/manifest.json") == record
        assert damaged in content(storage).values()
    assert_loads(storage, 1)


def test_what_is_not_one_flipped_bit_is_never_made_up() -> None:
    storage = MemoryStorage()
    save(storage, 1)
    record = storage.read("step_1/manifest.json")
    assert mend_record(record[:40] + b"XY" + record[42:]) is None
    assert mend_record(record[:-200]) is None
    assert mend_record(b"") is None


@pytest.mark.parametrize("lost", ["gone", "torn"])
def test_a_lost_record_is_made_anew_by_the_likeness_of_another_step(storage: Storage, lost: str) -> None:
    save(storage, 1, 2)
    written = decode_manifest(storage.read("step_2/manifest.json"))
    storage.delete(["step_2/manifest.json"])
    if lost == "torn":
        storage.put("step_2/manifest.json", [b'{"format": 1, "st'])
    before = content(storage)
    dry = sc.repair(storage, step=2)
    assert (dry.applied, content(storage)) == (False, before)
    report = sc.repair(storage, step=2, apply=True)
    assert report.after is not None
    assert report.after.verdict == "COMPLETE"
    assert_loads(storage, 2)
    made = decode_manifest(storage.read("step_2/manifest.json"))
    assert made.metadata["rebuilt"]["like"] == 1
    assert (made.files, made.tables, made.layouts) == (written.files, written.tables, written.layouts)
    assert before.items() - content(storage).items() <= {("step_2/manifest.json", b'{"format": 1, "st')}


@pytest.mark.parametrize("size", [Size(2), Size(2, 2)], ids=str)
def test_ranks_and_shards_come_back_by_likeness(tmp_path: Path, size: Size) -> None:
    save_on(size, tmp_path, 1, 2)
    (tmp_path / "step_2/manifest.json").unlink()
    report = sc.repair(tmp_path, step=2, apply=True)
    assert report.applied
    assert_loads_on(size, tmp_path, 2)


def test_without_a_witness_a_person_must_say_that_the_files_are_all(storage: Storage) -> None:
    save(storage, 1)
    storage.delete(["step_1/manifest.json"])
    before = content(storage)
    with pytest.raises(sc.InvalidOperationError, match="say how many"):
        sc.repair(storage, step=1, apply=True)
    assert content(storage) == before
    report = sc.repair(storage, step=1, apply=True, ranks=1)
    assert "metadata of the user" in report.lost
    assert_loads(storage, 1)


def test_ranks_come_back_by_their_number_and_never_with_one_missing(tmp_path: Path) -> None:
    save_on(Size(2), tmp_path, 1)
    (tmp_path / "step_1/manifest.json").unlink()
    with pytest.raises(sc.CheckpointDamagedError, match=r"rank_2\.pt is missing"):
        sc.repair(tmp_path, step=1, apply=True, ranks=3)
    with pytest.raises(sc.CheckpointDamagedError, match=r"rank_1\.pt is of none of 1 ranks"):
        sc.repair(tmp_path, step=1, apply=True, ranks=1)
    assert sc.repair(tmp_path, step=1, apply=True, ranks=2).applied
    assert_loads_on(Size(2), tmp_path, 1)


def test_several_shards_need_a_witness(tmp_path: Path) -> None:
    save_on(Size(1, 2), tmp_path, 1)
    (tmp_path / "step_1/manifest.json").unlink()
    with pytest.raises(sc.CheckpointDamagedError, match="one of several model shards"):
        sc.repair(tmp_path, step=1, apply=True, ranks=2)


@pytest.mark.parametrize("missing", ["rank_1.pt", "model.pt"])
def test_a_file_that_other_steps_have_is_missed(tmp_path: Path, missing: str) -> None:
    """A partly written attempt is never made a checkpoint."""
    save_on(Size(2), tmp_path, 1, 2)
    (tmp_path / "step_2/manifest.json").unlink()
    (tmp_path / "step_2" / missing).unlink()
    with pytest.raises(sc.InvalidOperationError):
        sc.repair(tmp_path, step=2, apply=True)
    with pytest.raises(sc.CheckpointDamagedError, match=missing):
        sc.repair(tmp_path, step=2, apply=True, ranks=2)
    assert Catalog(LocalStorage(tmp_path)).steps() == [1]


def test_no_record_is_made_over_damaged_files(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step_2/manifest.json").unlink()
    flip_byte(tmp_path / "step_2/rank_0.pt", 200)
    flip_byte(tmp_path / "step_2/model.pt", -30)
    with pytest.raises(sc.CheckpointDamagedError, match=r"model\.pt.*rank_0\.pt"):
        sc.repair(tmp_path, step=2, apply=True)


def test_an_attempt_that_was_written_is_committed_by_the_engine(storage: Storage) -> None:
    """All its files are there, and its record is not: what a crash just before the commit leaves."""
    save(storage, 1, 2)
    attempt = decode_manifest(storage.read("step_2/manifest.json")).attempt
    storage.delete(["step_2/manifest.json"])
    if isinstance(storage, RenamingStorage):
        storage.rename_folder("step_2", aside_folder(2, attempt, "tmp"))
    assert Catalog(storage).steps() == [1]
    assert sc.repair(storage, step=2).kind == "commit attempt"
    report = sc.repair(storage, step=2, apply=True)
    assert report.after is not None
    assert (report.after.verdict, report.after.attempt) == ("COMPLETE", attempt)
    assert_loads(storage, 2)


def test_an_attempt_with_its_own_record_is_put_in_force_as_it_is(tmp_path: Path) -> None:
    save(tmp_path, 1)
    record = (tmp_path / "step_1/manifest.json").read_bytes()
    (tmp_path / "step_1").rename(tmp_path / aside_folder(1, decode_manifest(record).attempt, "tmp"))
    assert sc.repair(tmp_path, step=1, apply=True).applied
    assert (tmp_path / "step_1/manifest.json").read_bytes() == record
    assert_loads(tmp_path, 1)


def test_of_several_attempts_one_must_be_named(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step_2/manifest.json").unlink()
    for attempt in ("00000000aa", "00000000bb"):
        shutil.copytree(tmp_path / "step_2", tmp_path / aside_folder(2, attempt, "tmp"))
    shutil.rmtree(tmp_path / "step_2")
    with pytest.raises(sc.InvalidOperationError, match="00000000aa"):
        sc.repair(tmp_path, step=2, apply=True)
    assert sc.repair(tmp_path, step=2, apply=True, attempt="00000000bb").applied
    assert_loads(tmp_path, 2)


def test_a_damaged_step_is_set_aside_and_never_offered_or_deleted(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    flip_byte(tmp_path / "step_2/model.pt", 200)
    files = {name: (tmp_path / "step_2" / name).read_bytes() for name in files_in(tmp_path / "step_2")}
    report = sc.repair(tmp_path, step=2, apply=True)
    assert (report.kind, report.after) == ("set aside", None)
    (aside,) = tmp_path.glob("damaged_step_2.*")
    assert {name: (aside / name).read_bytes() for name in files_in(aside)} == files
    assert Catalog(LocalStorage(tmp_path)).steps() == [1]
    assert [step.standing for step in sc.verify(tmp_path).steps] == ["committed", "set aside"]
    save(tmp_path, 2)
    assert_loads(tmp_path, 2)


def test_on_an_object_store_a_damaged_step_stays_where_it_is() -> None:
    storage = MemoryObjects("run")
    save(storage, 1)
    (key,) = [key for key in walk(storage) if key.endswith("model.pt")]
    storage.replace(key, storage.read(key)[:-1] + b"x")
    before = content(storage)
    with pytest.raises(sc.InvalidOperationError, match="object store"):
        sc.repair(storage, step=1, apply=True)
    assert content(storage) == before


@pytest.mark.parametrize("operation", [("put",), ("replace", "swap")])
def test_a_failure_on_the_way_leaves_what_was_there(operation: tuple[str, ...], storage: Storage) -> None:
    """Of both writes of a repair, the copy of the old record and the new one: the next try does it."""
    save(storage, 1, 2)
    storage.replace("step_2/manifest.json", b"nonsense")
    failing = FailingStorage(storage, on(*operation), error=lambda: OSError("full"))
    with pytest.raises(sc.CheckpointError, match="full"):
        sc.repair(failing, step=2, apply=True)
    assert storage.read("step_2/manifest.json") == b"nonsense"
    assert sc.repair(storage, step=2, apply=True).applied
    assert_loads(storage, 2)


def _save_sharded(rank: int, world_size: int, place: Path, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    state = _sharded_state(1.0, fully_shard)
    with sc.CheckpointManager(folder) as manager:
        manager.save(1, state).result()


def _load_sharded(rank: int, world_size: int, place: Path, folder: str) -> list[list[float]]:
    from torch.distributed.fsdp import fully_shard

    state = _sharded_state(0.0, fully_shard)
    with sc.CheckpointManager(folder) as manager:
        manager.load(1, state)
    return [parameter.full_tensor().flatten().tolist() for parameter in state["model"].parameters()]


def _sharded_state(number: float, shard: Any) -> dict[str, Any]:
    """Rows that do not divide evenly, and a parameter of which one rank holds nothing."""
    model = torch.nn.Linear(3, 5, bias=False)
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    with torch.no_grad():
        model.weight.copy_(torch.arange(15.0).view(5, 3) * number)
        model.scale.fill_(number)
    shard(model)
    return {"model": model, "rng": sc.RngState()}


def test_shards_are_put_together_from_the_files_alone(tmp_path: Path, ranks: Any) -> None:
    ranks.run(2, _save_sharded, str(tmp_path))
    (tmp_path / "step_1/manifest.json").unlink()
    assert sc.repair(tmp_path, step=1, apply=True, ranks=2).applied
    whole = [[float(number) for number in range(15)], [1.0]]
    assert ranks.run(2, _load_sharded, str(tmp_path)) == [whole, whole]
    (tmp_path / "step_1/manifest.json").unlink()
    (tmp_path / "step_1/rank_1.pt").unlink()
    with pytest.raises(sc.CheckpointDamagedError, match=r"model\.weight: what is there does not make up"):
        sc.repair(tmp_path, step=1, apply=True, ranks=1)
