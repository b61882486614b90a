"""`DcpReader` in one process: what it reads, what it refuses, and how many bytes that takes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import shardckpt as sc
from shardckpt.format.checksum import crc32, to_hex
from shardckpt.format.manifest import decode_manifest
from shardckpt.storage import LocalStorage, MemoryObjects
from shardckpt.testing.faults import CountingStorage, flip_byte, truncate
from tests.engine.states import assert_same, snapshot, train, training
from tests.engine.test_dcp_pieces import signed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")


def state() -> dict[str, Any]:
    return {
        "w": torch.arange(60_000.0).view(300, 200),
        "b": torch.arange(7),
        "h": torch.ones(4, dtype=torch.bfloat16),
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        "note": "as it was",
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }


def blank() -> dict[str, Any]:
    """The same state with nothing in it."""
    content = {key: torch.zeros_like(x) if isinstance(x, torch.Tensor) else x for key, x in state().items()}
    return {**content, "groups": [{"lr": 0.0, "betas": ()}], "note": ""}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp.save(state(), storage_writer=sc.DcpWriter(tmp_path / "step_4"))
    return tmp_path / "step_4"


def load(content: dict[str, Any], place: Any, **options: Any) -> None:
    dcp.load(content, storage_reader=place if isinstance(place, sc.DcpReader) else sc.DcpReader(place), **options)


def refused(place: Path, content: dict[str, Any] | None = None) -> BaseException:
    """The error that DCP distributes; the state is as it was."""
    content = blank() if content is None else content
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in content.items()}
    with pytest.raises(CheckpointException) as caught:
        load(content, place)
    assert all(
        torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else value == before[key]
        for key, value in content.items()
    )
    error = caught.value.failures[0][0]
    assert isinstance(error, sc.CheckpointError), error
    return error


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def test_everything_comes_back(saved: Path) -> None:
    content = blank()
    load(content, saved)
    assert same(state(), content)


def test_a_part_of_it_comes_back_alone(saved: Path) -> None:
    storage = CountingStorage(LocalStorage(saved.parent))
    content = {"b": torch.zeros(7, dtype=torch.int64), "note": ""}
    load(content, sc.DcpReader("step_4", storage=storage))
    assert content["b"].tolist() == list(range(7))
    assert content["note"] == "as it was"
    assert storage.nbytes["step_4/rank_0.pt"] < 4096, "index, tree and 56 bytes"


def test_the_metadata_is_dcps_own(saved: Path) -> None:
    metadata = sc.DcpReader(saved).read_metadata()
    found = metadata.state_dict_metadata
    assert found["note"] == BytesStorageMetadata()
    assert found["groups.0.betas"] == BytesStorageMetadata()
    weight = found["w"]
    assert isinstance(weight, TensorStorageMetadata)
    assert (weight.properties.dtype, weight.size) == (torch.float32, torch.Size((300, 200)))
    assert weight.chunks == [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((300, 200)))]
    assert dict(metadata.planner_data)["groups.0.lr"] == ("groups", 0, "lr")
    assert metadata.storage_meta.checkpoint_id == str(saved)


def test_a_state_can_be_built_from_nothing(saved: Path) -> None:
    content = _load_state_dict_from_keys(storage_reader=sc.DcpReader(saved))
    assert same(state(), content)
    assert list(_load_state_dict_from_keys("groups", storage_reader=sc.DcpReader(saved))) == ["groups"]


def test_what_a_manager_saved(tmp_path: Path) -> None:
    original = training()
    train(original, 3)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(3, original).result()
    expected, losses = snapshot(original), train(original, 2)
    again = training(seed=1)
    model, optimizer = get_state_dict(again["model"], again["optimizer"])
    rest = {key: again[key] for key in ("scheduler", "counter", "progress")}
    rng = sc.RngState()
    content = {"model": model, "optimizer": optimizer, "rng": rng, **rest}
    # an object whose keys grow says what it has only once it has been loaded
    del content["counter"]
    load(content, tmp_path / "step_3")
    set_state_dict(again["model"], again["optimizer"], model_state_dict=model, optim_state_dict=optimizer)
    again["progress"] = content["progress"]
    rng.load_state_dict(content["rng"].state_dict())
    again["counter"].seen = dict(expected["counter"])
    assert_same(expected, snapshot(again))
    torch.manual_seed(0)
    load({"rng": rng}, tmp_path / "step_3")
    assert train(again, 2) == losses


def test_from_an_object_store() -> None:
    storage = MemoryObjects()
    for _ in range(2):
        dcp.save(state(), storage_writer=sc.DcpWriter("final", storage=storage))
    content = blank()
    load(content, sc.DcpReader("final", storage=storage))
    assert same(state(), content)


def test_through_fsspec() -> None:
    content = blank()
    dcp.save(state(), storage_writer=sc.DcpWriter("memory://dcp-test/run/step_1"))
    load(content, "memory://dcp-test/run/step_1")
    assert same(state(), content)
    with sc.CheckpointManager("memory://dcp-test/run") as checkpoints:
        assert checkpoints.steps() == [1]


def test_another_dtype_is_refused_unless_converting_was_asked_for(saved: Path) -> None:
    wrong = {**blank(), "w": torch.zeros(300, 200, dtype=torch.bfloat16), "b": torch.zeros(7)}
    error = refused(saved, wrong)
    assert isinstance(error, sc.CheckpointMismatchError)
    assert error.problems == (
        "dtype: b is int64 in the checkpoint, torch.float32 in the state",
        "dtype: w is float32 in the checkpoint, torch.bfloat16 in the state",
    )
    load(wrong, sc.DcpReader(saved, dtype="cast"))
    assert torch.equal(wrong["w"], state()["w"].bfloat16())
    assert wrong["b"].tolist() == list(range(7))


def test_missing_keys_and_other_shapes_are_dcps_to_refuse(saved: Path) -> None:
    with pytest.raises(CheckpointException, match="nowhere"):
        load({"nowhere": torch.zeros(1)}, saved)
    with pytest.raises(CheckpointException, match="Size mismatch"):
        load({"b": torch.zeros(8, dtype=torch.int64)}, saved)
    content = {"nowhere": torch.zeros(1), "b": torch.zeros(7, dtype=torch.int64)}
    load(content, saved, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert content["b"].tolist() == list(range(7))


def test_there_is_none(tmp_path: Path) -> None:
    error = refused(tmp_path / "step_9")
    assert isinstance(error, sc.CheckpointNotFoundError)
    with pytest.raises(sc.CheckpointNotFoundError):
        _ = sc.DcpReader(tmp_path / "step_9").read_metadata().state_dict_metadata
    (tmp_path / "step_9").mkdir()
    (tmp_path / "step_9" / "rank_0.pt").write_bytes(b"leftover")
    assert isinstance(refused(tmp_path / "step_9"), sc.CheckpointNotFoundError)


def test_a_folder_that_was_renamed(saved: Path) -> None:
    saved.rename(saved.parent / "step_5")
    assert "the record of step 4" in str(refused(saved.parent / "step_5"))
    (saved.parent / "step_5").rename(saved.parent / "kept")
    load(blank(), saved.parent / "kept")


def test_a_flipped_byte_anywhere_is_found(saved: Path) -> None:
    """In the record, in an index, a tree or a tensor; bytes between them are not read."""
    manifest = decode_manifest((saved / "manifest.json").read_bytes())
    (file,) = manifest.files
    assert file.index is not None
    assert file.tree is not None
    loaded = torch.load(saved / file.name, weights_only=True, mmap=True)
    ranges = [(file.index[0], file.index[1]), (file.tree[0], file.tree[1])]
    content = (saved / file.name).read_bytes()
    ranges += [(content.index(x.numpy().tobytes()), x.nbytes) for x in (loaded["w"], loaded["b"])]
    for start, nbytes in ranges:
        for at in (start, start + nbytes // 2, start + nbytes - 1):
            flip_byte(saved / file.name, at)
            assert isinstance(refused(saved), sc.CheckpointDamagedError)
            flip_byte(saved / file.name, at)
    for at in (0, 300, -5):
        flip_byte(saved / "manifest.json", at)
        assert isinstance(refused(saved), sc.CheckpointDamagedError)
        flip_byte(saved / "manifest.json", at)
    load(blank(), saved)


def test_a_file_cut_off_or_gone(saved: Path) -> None:
    truncate(saved / "rank_0.pt", (saved / "rank_0.pt").stat().st_size - 1)
    assert isinstance(refused(saved), sc.CheckpointDamagedError)
    (saved / "rank_0.pt").unlink()
    error = refused(saved)
    assert isinstance(error, sc.CheckpointDamagedError)
    assert "rank_0.pt" in str(error)


LIES: dict[str, Callable[[Any], Any]] = {
    "a file above": lambda c: c["files"][0].update(name="../secret.pt"),
    "a file elsewhere": lambda c: c["files"][0].update(name="/etc/passwd"),
    "a file with a drive": lambda c: c["files"][0].update(name="C:\\secret"),
    "another file": lambda c: c["files"][0].update(name="rank_9.pt"),
    "a rank that there is not": lambda c: c["layouts"][0]["pieces"][0].__setitem__(0, 1),
    "a piece beyond the tensor": lambda c: c["layouts"][0]["pieces"][0][2].__setitem__(0, 301),
    "a larger tensor": lambda c: c["tables"][0]["tensors"]["shape"].__setitem__(0, [300, 201]),
    "another dtype": lambda c: c["tables"][0]["tensors"]["dtype"].__setitem__(1, "float64"),
    "a value that is not there": lambda c: c["tables"][0]["values"]["rank"].append("more"),
    "another tensor's name": lambda c: c["tables"][0]["tensors"]["name"].__setitem__(1, "elsewhere"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_record_that_lies_leads_nowhere(saved: Path, lie: Callable[[Any], Any]) -> None:
    (saved.parent / "secret.pt").write_bytes((saved / "rank_0.pt").read_bytes())
    content = json.loads((saved / "manifest.json").read_bytes())
    lie(content)
    content["parts"] = sorted({key.split(".")[0] for key in _keys(content)})
    (saved / "manifest.json").write_bytes(signed(content))
    wanted = blank()
    keys = _keys(content)
    if "more" in keys:
        wanted["more"] = 1
    if "elsewhere" in keys:
        wanted["elsewhere"] = wanted.pop("b")
    if content["tables"][0]["tensors"]["dtype"][1] == "float64":
        wanted["b"] = torch.zeros(7, dtype=torch.float64)
    assert isinstance(refused(saved, wanted), sc.CheckpointLoadError)


def _keys(content: Any) -> list[str]:
    (table,) = content["tables"]
    return [*table["tensors"]["name"], *table["values"]["rank"]]


def test_a_value_that_would_run_code_is_not_read(saved: Path) -> None:
    """Somebody swaps the tree for another and makes every digest agree."""
    content = json.loads((saved / "manifest.json").read_bytes())
    at, nbytes, _ = content["files"][0]["tree"]
    evil = b"cos\nsystem\n(S'touch " + str(saved / "owned").encode() + b"'\ntR0}."
    assert len(evil) < nbytes
    evil = evil.ljust(nbytes, b" ")
    data = bytearray((saved / "rank_0.pt").read_bytes())
    data[at : at + nbytes] = evil
    (saved / "rank_0.pt").write_bytes(data)
    content["files"][0]["tree"][2] = to_hex(crc32(evil))
    (saved / "manifest.json").write_bytes(signed(content))
    assert isinstance(refused(saved), sc.CheckpointDamagedError)
    assert "owned" not in os.listdir(saved)


def test_only_the_rows_that_are_needed_are_read(tmp_path: Path) -> None:
    """DCP's own reader reads a chunk whole to use an eighth of it."""
    weight = torch.randn(4096, 256)
    dcp.save({"w": weight}, storage_writer=sc.DcpWriter(tmp_path / "step_1"))
    storage = CountingStorage(LocalStorage(tmp_path))
    target = torch.zeros(512, 256)

    class Rows(DefaultLoadPlanner):
        """An eighth of the rows."""

        def create_local_plan(self) -> Any:
            plan = super().create_local_plan()
            (item,) = plan.items
            offset = torch.Size((512, 0))
            return replace(plan, items=[replace(item, storage_offsets=offset, lengths=torch.Size((512, 256)))])

        def resolve_tensor(self, read_item: Any) -> torch.Tensor:
            return target

    load({"w": torch.zeros(4096, 256)}, sc.DcpReader("step_1", storage=storage), planner=Rows())
    assert torch.equal(target, weight[512:1024])
    assert storage.nbytes["step_1/rank_0.pt"] < target.nbytes * 1.02


def test_a_checkpoint_replaced_between_two_ranks_looks_is_noticed(saved: Path) -> None:
    plans = []
    for _ in range(2):
        reader = sc.DcpReader(saved)
        reader.set_up_storage_reader(reader.read_metadata(), True)
        plans.append(reader.prepare_local_plan(dcp.planner.LoadPlan([])))
        dcp.save(state(), storage_writer=sc.DcpWriter(saved))
    with pytest.raises(sc.CheckpointLoadError, match="replaced while it was being loaded"):
        reader.prepare_global_plan(plans)
