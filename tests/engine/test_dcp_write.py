"""`DcpWriter` in one process: what lies there afterwards, and what does not after a failure."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict

import shardckpt as sc
from shardckpt.engine.dcp.image import seal_in_place
from shardckpt.engine.dcp.place import find_record, place_of
from shardckpt.engine.saving.draft import PlannedRecord
from shardckpt.engine.saving.plan import FilePlan, SavePlan
from shardckpt.engine.saving.stage import Stager
from shardckpt.format.manifest import Table
from shardckpt.format.tree import spell_tree
from shardckpt.storage import LocalStorage, MemoryObjects, MemoryStorage, Storage
from shardckpt.testing.faults import FailingStorage, on
from tests.engine.states import Net, assert_same, snapshot, train, training

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")


def save(state: dict[str, Any], writer: sc.DcpWriter, **options: Any) -> None:
    dcp.save(state, storage_writer=writer, **options)


def cause(caught: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    """The error that DCP has distributed."""
    return caught.value.failures[0][0]


def nested() -> dict[str, Any]:
    """Containers of every kind that DCP looks into."""
    return {
        "params": {"w": torch.arange(70_000.0), "b": torch.ones(3, dtype=torch.bfloat16)},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}, {"lr": 0.2, "betas": (0.8, 0.88)}],
        "mixed": [torch.zeros(2, dtype=torch.int8), None, {"deep": [torch.tensor(7)]}],
        "plain": {"text": "ä", "bytes": b"\0\1", "list": [1, 2.5, None], "nothing": None, "set": {3}},
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "a.b": {"c.d": 1},
    }


def same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other
        assert type(one) is type(other)


def test_a_file_is_a_plain_torch_file_with_the_callers_nesting(tmp_path: Path) -> None:
    save(nested(), sc.DcpWriter(tmp_path / "step_5"))
    file = tmp_path / "step_5" / "rank_0.pt"
    assert sorted(os.listdir(tmp_path / "step_5")) == ["manifest.json", "rank_0.pt"]
    same(nested(), torch.load(file, mmap=True, weights_only=True))
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None


def test_the_file_is_that_of_our_own_save(tmp_path: Path) -> None:
    """Byte for byte what a `Stager` makes, with holes and without a copy."""
    sizes = [(), (3,), (40_000,), (7, 5), (0, 2), (200, 300), (1,)]
    tensors = [torch.randn(shape).to(random.choice((torch.float32, torch.float64))) for shape in sizes]
    tensors.append(torch.randn(300, 200).t())
    records = tuple(
        PlannedRecord(t, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numel() * t.itemsize) for t in tensors
    )
    file = FilePlan("rank_0.pt", "rank", records, (), spell_tree({"value": 1}))
    stager = Stager()
    try:
        staging = stager.prepare(SavePlan((file,), (), (), Table((0,), {}, {}), {}, {}), rank=0)
        staging.copy(lambda _: True)
        (expected,) = staging.seal()
        made = seal_in_place(file, rank=0)
        assert b"".join(made.parts) == b"".join(expected.parts)
        assert made.entry == expected.entry
    finally:
        stager.close()


def test_a_manager_finds_and_resumes_it(tmp_path: Path) -> None:
    state = training()
    train(state, 3)
    model, optimizer = get_state_dict(state["model"], state["optimizer"])
    rest = {key: state[key] for key in ("scheduler", "counter", "rng", "progress")}
    save({"model": model, "optimizer": optimizer, **rest}, sc.DcpWriter(tmp_path / "step_3"))
    expected, losses = snapshot(state), train(state, 2)
    again = training(seed=1)
    del again["nothing"]
    with sc.CheckpointManager(tmp_path) as checkpoints:
        info = checkpoints.resume(again)
    assert info is not None
    assert info.step == 3
    assert_same(expected, snapshot(again))
    assert train(again, 2) == losses, "the random streams go on where they were"


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    net = Net()
    save({"model": net.state_dict()}, sc.DcpWriter(tmp_path / "step_1"))
    nbytes = sum(p.numel() * p.itemsize for p in net.state_dict().values())
    tied = net.head.weight.numel() * 4
    assert (tmp_path / "step_1" / "rank_0.pt").stat().st_size < nbytes - tied + 40_000
    loaded = torch.load(tmp_path / "step_1" / "rank_0.pt", weights_only=True)["model"]
    assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()


@pytest.mark.parametrize("name", ["bool", "uint16", "float16", "float8_e5m2", "float8_e8m0fnu", "complex32"])
def test_dtypes(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    raw = torch.randint(0, 2 if name == "bool" else 100, (6, 4 * dtype.itemsize), dtype=torch.uint8)
    save({"x": raw.view(dtype)}, sc.DcpWriter(tmp_path / "step_1"))
    target = torch.zeros_like(raw)
    dcp.load({"x": target.view(dtype)}, storage_reader=sc.DcpReader(tmp_path / "step_1"))
    assert torch.equal(target, raw)


def test_views_and_lazy_conjugates(tmp_path: Path) -> None:
    base = torch.randn(300, 400, dtype=torch.complex64)
    state = {"t": base.t(), "slice": base[::2, 3:5], "conj": base.conj(), "neg": base.conj().imag, "grad": base.real}
    state["parameter"] = torch.nn.Parameter(torch.randn(3))
    save(state, sc.DcpWriter(tmp_path / "step_1"))
    for key, value in torch.load(tmp_path / "step_1" / "rank_0.pt", weights_only=True).items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", ["final", "epoch=3", "step_007", "step_-1", "Schritt 4"])
def test_any_folder_name_will_do(tmp_path: Path, name: str) -> None:
    save({"x": torch.ones(3)}, sc.DcpWriter(tmp_path / name))
    assert os.listdir(tmp_path) == [name]
    target = {"x": torch.zeros(3)}
    dcp.load(target, storage_reader=sc.DcpReader(str(tmp_path / name) + "/"))
    assert target["x"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("url", ["", "/", "s3://bucket", "memory://", "s3://b/r/step_1?x=1", "a/step_3.0123456789.tmp"])
def test_a_url_that_names_no_checkpoint_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match=r"name"):
        sc.DcpWriter(url)
    assert not sc.DcpWriter.validate_checkpoint_id("s3://bucket")
    assert sc.DcpWriter.validate_checkpoint_id("s3://bucket/run/step_4")


def test_where_a_url_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for url, root, folder in [
        ("s3://bucket/runs/a/step_4/", "s3://bucket/runs/a", "step_4"),
        ("memory://step_4", None, None),
        ("file:///tmp/x/step_4", "file:///tmp/x", "step_4"),
        ("file:///step_4", "file:///", "step_4"),
        ("step_4", str(tmp_path), "step_4"),
        ("runs/../step_4", str(tmp_path), "step_4"),
    ]:
        if root is None:
            with pytest.raises(ValueError, match="does not name a checkpoint"):
                place_of(url)
            continue
        place = place_of(url)
        assert (place.root, place.folder, place.step) == (root, folder, 4)


def test_a_checkpoint_id_replaces_the_url(tmp_path: Path) -> None:
    writer = sc.DcpWriter(tmp_path / "step_1")
    save({"x": torch.ones(3)}, writer, checkpoint_id=tmp_path / "other" / "step_9")
    assert os.listdir(tmp_path) == ["other"]
    assert writer.checkpoint_id == str(tmp_path / "other" / "step_9")
    target = {"x": torch.zeros(3)}
    reader = sc.DcpReader(tmp_path / "step_1")
    dcp.load(target, storage_reader=reader, checkpoint_id=str(tmp_path / "other" / "step_9"))
    assert target["x"].tolist() == [1, 1, 1]


def test_no_credential_is_shown_or_kept_in_the_open(caplog: pytest.LogCaptureFixture) -> None:
    writer = sc.DcpWriter("s3://key:geheim@host/runs/step_1", storage_options={"secret": "auchgeheim"})
    shown = f"{writer!r} {writer.checkpoint_id} {writer.storage_meta()} {writer._place!r}"
    assert "geheim" not in shown
    assert "runs/step_1" in shown


@pytest.mark.parametrize("renames", [True, False], ids=["file system", "object store"])
def test_saving_again_replaces_the_old_one_at_the_commit(tmp_path: Path, renames: bool) -> None:
    storage: Storage = MemoryStorage() if renames else MemoryObjects()
    for number in range(3):
        save({"x": torch.full((5,), number)}, sc.DcpWriter("step_8", storage=storage))
    broken = FailingStorage(storage, on("put", key="manifest.json"), times=None)
    broken = FailingStorage(broken, on("replace", "swap", key="manifest.json"), times=None)
    with pytest.raises(CheckpointException) as caught:
        save({"x": torch.full((5,), 9)}, sc.DcpWriter("step_8", storage=broken))
    assert isinstance(cause(caught), sc.CheckpointSaveError)
    target = {"x": torch.zeros(5, dtype=torch.int64)}
    dcp.load(target, storage_reader=sc.DcpReader("step_8", storage=storage))
    assert target["x"].tolist() == [2] * 5
    assert storage.list() == ["step_8/"], "no leftovers"
    assert len(storage.list("step_8")) == 2


def test_between_the_two_renames_of_a_replacement_the_old_one_is_found(tmp_path: Path) -> None:
    """A crash there may leave it so for good."""
    save({"x": torch.ones(3)}, sc.DcpWriter(tmp_path / "final"))
    (tmp_path / "final").rename(tmp_path / "final.0123456789abcdef.old")
    folder, _ = find_record(LocalStorage(tmp_path), "final")
    assert folder == "final.0123456789abcdef.old"
    target = {"x": torch.zeros(3)}
    dcp.load(target, storage_reader=sc.DcpReader(tmp_path / "final"))
    assert target["x"].tolist() == [1, 1, 1]
    save({"x": torch.full((3,), 2.0)}, sc.DcpWriter(tmp_path / "final"))
    dcp.load(target, storage_reader=sc.DcpReader(tmp_path / "final"))
    assert target["x"].tolist() == [2, 2, 2]


FAULTS: dict[str, Callable[[Storage], Storage]] = {
    "begin": lambda storage: FailingStorage(storage, on("make_folder"), error=lambda: PermissionError("injected")),
    "write": lambda storage: FailingStorage(storage, on("put", key="rank_0.pt"), error=lambda: OSError(28, "full")),
    "write, any error": lambda storage: FailingStorage(storage, on("put"), error=lambda: KeyboardInterrupt()),
    "record": lambda storage: FailingStorage(storage, on("put", key="manifest"), error=lambda: OSError(5, "injected")),
    "rename": lambda storage: FailingStorage(storage, on("rename_folder"), error=lambda: OSError(5, "injected")),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_after_a_failure_nothing_is_left_and_the_same_writer_works(
    tmp_path: Path, fault: Callable[[Storage], Storage]
) -> None:
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    writer = sc.DcpWriter("step_2", storage=fault(LocalStorage(tmp_path)))
    with pytest.raises(CheckpointException) as caught:
        save(nested(), writer)
    assert isinstance(cause(caught), sc.CheckpointSaveError)
    assert "step_2 was not saved" in str(caught.value)
    assert os.listdir(tmp_path) == []
    save(nested(), writer)
    assert os.listdir(tmp_path) == ["step_2"]


def test_what_a_save_that_never_reached_its_end_left_goes_with_the_next(tmp_path: Path) -> None:
    """DCP tells a writer of no failure outside of it: the coordinator cleans up when it is used again."""

    class Lost(DefaultSavePlanner):
        def finish_plan(self, new_plan: Any) -> Any:
            raise RuntimeError("the planner fails after the attempt has begun")

    writer = sc.DcpWriter(tmp_path / "step_1")
    with pytest.raises(CheckpointException, match="the planner fails"):
        save(nested(), writer, planner=Lost())
    (left,) = os.listdir(tmp_path)
    assert left.startswith("step_1.")
    save(nested(), writer)
    assert os.listdir(tmp_path) == ["step_1"]


def test_after_a_commit_of_unknown_outcome_nothing_is_deleted() -> None:
    storage = MemoryObjects()
    unknown = FailingStorage(storage, on("put", key="manifest"), error=lambda: TimeoutError("no answer"))
    deaf = FailingStorage(unknown, on("read", key="manifest"), nth=2, times=1, error=lambda: TimeoutError("no answer"))
    with pytest.raises(CheckpointException) as caught:
        save({"x": torch.ones(2)}, sc.DcpWriter("step_1", storage=deaf))
    assert isinstance(cause(caught), sc.CommitUnknownError)
    (attempt,) = storage.list("step_1")
    assert storage.list(f"step_1/{attempt}") == ["rank_0.pt"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (random.Random(3), r"random\.Random"),
        ((torch.ones(2), 1), "lists instead of tuples"),
        (({"a": 1},), "lists instead of tuples"),
        (torch.ones(3).to_sparse(), "layout"),
        (torch.empty(3, device="meta"), "meta device"),
        (lambda: 1, "key.y"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, value: Any, reason: str) -> None:
    with pytest.raises(CheckpointException, match=reason) as caught:
        save({"key": {"y": value}, "good": torch.ones(2)}, sc.DcpWriter(tmp_path / "step_1"))
    assert "key.y" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_planner_that_does_not_say_what_it_changes_is_caught(tmp_path: Path) -> None:
    class Half(DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:
            return object.half()

    with pytest.raises(CheckpointException, match=r"x: DCP planned torch.float32 \[3\].*holds torch.float16"):
        save({"x": torch.ones(3)}, sc.DcpWriter(tmp_path / "step_1"), planner=Half())
    assert os.listdir(tmp_path) == []


def test_cached_plans_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would say where an earlier save wrote."""
    planner = DefaultSavePlanner
    for cache in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
        monkeypatch.setattr(dcp.SavePlanner, f"_cached_{cache}", {})
    save(nested(), sc.DcpWriter(tmp_path / "step_1"), planner=planner(enable_plan_caching=True))
    with pytest.raises(CheckpointException, match="enable_plan_caching=False"):
        save(nested(), sc.DcpWriter(tmp_path / "step_2"), planner=planner(enable_plan_caching=True))
    assert os.listdir(tmp_path) == ["step_1"]
    save(nested(), sc.DcpWriter(tmp_path / "step_2"))


def test_saving_without_collectives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sc.CheckpointSaveError, match="use_collectives"):
        save(nested(), sc.DcpWriter(tmp_path / "step_1"), use_collectives=False)
    assert os.listdir(tmp_path) == []


def test_names_stay_flat_without_a_flattening_planner(tmp_path: Path) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    save({"a.b": torch.ones(2), "n": 3}, sc.DcpWriter(tmp_path / "step_1"), planner=planner)
    loaded = torch.load(tmp_path / "step_1" / "rank_0.pt", weights_only=True)
    assert sorted(loaded) == ["a.b", "n"]


def test_async_save_keeps_what_was_handed_in(tmp_path: Path) -> None:
    state = nested()
    expected = nested()
    future = dcp.async_save(state, storage_writer=sc.DcpWriter(tmp_path / "step_1"))
    state["params"]["w"].zero_()
    future.result(timeout=60)
    loaded = torch.load(tmp_path / "step_1" / "rank_0.pt", weights_only=True)
    same(expected, loaded)


def test_a_failed_async_save_does_not_poison_the_next(tmp_path: Path) -> None:
    full = FailingStorage(LocalStorage(tmp_path), on("put", key="rank_0"), error=lambda: OSError(28, "full"))
    writer = sc.DcpWriter("step_1", storage=full)
    with pytest.raises(CheckpointException, match="full"):
        dcp.async_save(nested(), storage_writer=writer).result(timeout=60)
    dcp.async_save(nested(), storage_writer=writer).result(timeout=60)
    assert os.listdir(tmp_path) == ["step_1"]


@pytest.mark.slow
def test_async_save_by_a_process_of_dcps_own(tmp_path: Path, free_port: int) -> None:
    """DCP spawns it and never ends it, so all of this happens in a process of its own."""
    program = textwrap.dedent(f"""
        import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
        import shardckpt as sc
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
        if __name__ == "__main__":
            dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{free_port}", rank=0, world_size=1)
            for step in (1, 2):
                state = {{"x": torch.full((70_000,), step), "step": step}}
                writer = sc.DcpWriter({str(tmp_path)!r} + f"/step_{{step}}")
                process = AsyncCheckpointerType.PROCESS
                dcp.async_save(state, storage_writer=writer, async_checkpointer_type=process).result(timeout=100)
    """)
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    for step in (1, 2):
        state = {"x": torch.zeros(70_000, dtype=torch.int64), "step": 0}
        dcp.load(state, storage_reader=sc.DcpReader(tmp_path / f"step_{step}"))
        assert state["step"] == step
        assert int(state["x"].min()) == int(state["x"].max()) == step


def test_a_writer_travels_to_another_process(tmp_path: Path) -> None:
    writer = sc.DcpWriter(tmp_path / "step_1", storage_options={})
    save({"x": torch.ones(2)}, writer)
    again = pickle.loads(pickle.dumps(writer))
    save({"x": torch.ones(2)}, again, checkpoint_id=tmp_path / "step_2")
    assert sorted(os.listdir(tmp_path)) == ["step_1", "step_2"]
