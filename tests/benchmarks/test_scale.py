"""The simulator of many ranks, small: what a rank has to do does not grow with the others. Counted, not timed."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.scale.__main__ import main
from benchmarks.scale.cases import meshes
from benchmarks.scale.history import ask
from benchmarks.scale.jobs import Mesh, Model, Rank
from benchmarks.scale.loading import plan_load
from benchmarks.scale.peers import plan_with_dcp
from benchmarks.scale.saving import Committed, commit, plan_rank
from benchmarks.scale.world import World, bytes_bound
from shardckpt.engine.saving.plan import plan_save
from shardckpt.state import StateReader

DENSE = Model(2, 16_384, 16_384, 32_768)
MOE = Model(2, 16_384, 16_384, 32_768, experts=8)


@pytest.fixture(autouse=True)
def nobody() -> Iterator[None]:
    """No test leaves the process a rank of something."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def calls(work: Callable[[], object]) -> int:
    """Calls of our functions, but of those by which garbage of other tests would be cleared away meanwhile."""
    gc.collect()
    gc.disable()
    count = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and "/shardckpt/" in frame.f_code.co_filename

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
def test_a_rank_of_a_thousand_plans_what_a_rank_of_sixteen_plans(model: Model) -> None:
    few, many = (Mesh(ranks // 4, 4, ep=4 if model.experts else 1) for ranks in (16, 1024))
    works = [calls(lambda mesh=mesh: plan_rank(mesh, model, 9, again=1)) for mesh in (few, few, many)]  # type: ignore[misc]
    assert works[2] <= 1.1 * works[1]


def test_meshes_are_not_compared_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one process are often equal and not the same: to tell is a look at all ranks."""
    compared = 0
    equal = DeviceMesh.__eq__

    def count(one: DeviceMesh, other: object) -> bool:
        nonlocal compared
        compared += one is not other
        return equal(one, other)

    plan_rank(Mesh(4, 4), DENSE, 5, again=1)
    state = Rank(Mesh(4, 4), DENSE, 5).state()
    parts = StateReader().take_apart(state)
    monkeypatch.setattr(DeviceMesh, "__eq__", count)
    assert len(plan_save(parts, Mesh(4, 4).coordinates(5)).table.tensors) > 50
    assert compared <= 10


def test_what_it_takes_to_find_the_bytes_does_not_grow() -> None:
    counts = []
    for ranks in (64, 1024):
        mesh = Mesh(ranks // 4, 4)
        saved = commit(mesh, DENSE)
        same = plan_load(saved, on=mesh, rank=ranks // 2)
        half = plan_load(saved, on=Mesh(mesh.dp // 2, 4), rank=ranks // 4)
        counts.append((same, half, len(saved.record)))
    (few_same, few_half, few_record), (many_same, many_half, many_record) = counts
    assert many_same.requests == few_same.requests
    assert many_half.requests <= few_half.requests + 2
    assert many_same.objects <= 1.1 * few_same.objects
    assert many_half.other_nbytes <= 1.1 * few_half.other_nbytes
    assert (many_record - few_record) / (1024 - 64) < 64, "bytes of the record for each further rank"


def test_the_record_of_many_ranks_is_columns_and_runs() -> None:
    saved = commit(Mesh(64, 4), DENSE)
    content = json.loads(saved.record)
    assert content["format"] == 3
    assert content["shard_of"][0] == [0, 1, 4]
    assert sum(len(table["tensors"]["name"]) for table in content["tables"]) == len(saved.manifest.tables[0].tensors)


def test_receipts_made_of_others_are_what_the_ranks_would_have_sent() -> None:
    mesh = Mesh(4, 2)
    made, true = commit(mesh, DENSE), commit(mesh, DENSE, real=range(mesh.ranks))
    assert len(true.planned) == mesh.ranks > len(made.planned)

    def told(saved: Committed) -> Any:
        manifest = saved.manifest
        files = sorted((file.name, file.kind, file.writer) for file in manifest.files)
        return manifest.tables, manifest.meshes, manifest.layouts, manifest.differ, files

    assert told(made) == told(true)
    assert made.manifest.nbytes == pytest.approx(true.manifest.nbytes, rel=0.01)


def test_a_step_is_found_in_a_run_of_many_by_as_many_requests_as_in_one_of_few() -> None:
    few, many = ask(10), ask(300)
    assert many["newest step"].requests == few["newest step"].requests
    assert sum(many["all steps"].requests.values()) <= 300 + 2


def test_dcp_plans_the_same_job() -> None:
    cost = plan_with_dcp(Mesh(2, 2), DENSE)
    assert cost.metadata_nbytes > 1000 < cost.sent_nbytes


def test_the_least_time_is_that_of_the_narrower_way() -> None:
    world = World(ranks_per_host=8, host_rate=1e9, store_rate=4e9)
    assert bytes_bound(world, Mesh(2, 8), 16 * 10**9) == 8.0
    assert bytes_bound(world, Mesh(20, 8), 16 * 10**9) == 4.0


def test_meshes_divide_the_ranks() -> None:
    for ranks in (1, 8, 64, 512):
        for experts in (False, True):
            own, others = meshes(ranks, experts=experts)
            assert own.ranks == ranks
            assert all(other.ranks in (ranks // 2, ranks) for other in others)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "scale.json"
    assert main(["--ranks", "8", "--tensors", "60", "--steps", "5", "--json", str(report)]) == 0
    assert "| dense, 60 tensors | 8 | FSDP 1 x TP 8 |" in capsys.readouterr().out
    assert json.loads(report.read_text())["cases"][0]["ranks"] == 8


def test_a_number_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--ranks", "0"])
    assert "0 is not a number of at least 1" in capsys.readouterr().err
