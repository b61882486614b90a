"""Folders in which each rank has written a file of its own: joined as the files say, or refused with one error."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shardckpt as sc
from shardckpt.errors import CheckpointDamagedError, CheckpointError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.tools.moving.folders import find, open_source
from tests.distributed.jobs import Layout
from tests.tools.moving import rank_files
from tests.tools.moving.rank_files import LAYOUTS
from tests.tools.moving.reading import same, state_of, tensors_of
from tests.tools.moving.test_foreign_folders import MODEL, OPTIMIZER

OTHER = Layout(2)


def reference(root: Path) -> dict[str, torch.Tensor]:
    """The model's tensors, as torch gathered them."""
    gathered = torch.load(root / "reference.pt", weights_only=True)
    return {name.replace(" ", ".", 1): value for name, value in gathered.items() if name.startswith("model ")}


def model_of(place: Path, *, piece: int = 1 << 20) -> dict[str, torch.Tensor]:
    source = open_source(place, parts=["model"])
    try:
        return tensors_of(source, piece=piece)
    finally:
        source.close()


def alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return same(dict(sorted(found.items())), dict(sorted(expected.items())))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_ranks_saved_by_items_is_one_state(ranks: Any, tmp_path: Path, name: str) -> None:
    """DTensors are joined, copies taken once, what differs stays each rank's; and a job of another size goes on."""
    ranks.run(4, rank_files.save_items, tmp_path, LAYOUTS[name])
    found = find(tmp_path / "step")
    parts = ["model", "optimizer", "step", *(f"rng_{rank}" for rank in range(4))]
    assert (found.kind, found.step) == ("a checkpoint of torch_checkpointing", 2)
    assert sorted(found.source.tree) == sorted(parts)
    state = state_of(found.source)
    found.source.close()
    assert [int(state[f"rng_{rank}"]["torch"][0] - state["rng_0"]["torch"][0]) % 256 for rank in range(4)] == [
        0,
        1,
        2,
        3,
    ]
    for piece in (1 << 20, 37):
        assert alike(model_of(tmp_path / "step", piece=piece), reference(tmp_path))
    sc.convert(tmp_path / "step", tmp_path / "run", parts=["model", "optimizer"])
    assert ranks.run(OTHER.ranks, rank_files.resume, tmp_path, OTHER) == [[]] * OTHER.ranks


FAIRSEQ2: dict[str, tuple[Callable[..., None], Layout, list[str]]] = {
    "0.4": (
        rank_files.save_rank_files,
        LAYOUTS["FSDP2 x TP"],
        ["data_0", "data_1", "data_2", "data_3", "epoch", "model", "optimizer", "scheduler"],
    ),
    "0.8": (
        rank_files.save_folders,
        LAYOUTS["FSDP2"],
        ["data_reader_0", "data_reader_1", "data_reader_2", "data_reader_3", "model", "optimizer", "trainer"],
    ),
}


@pytest.mark.parametrize("version", FAIRSEQ2)
def test_a_step_of_fairseq2_of_several_ranks(ranks: Any, tmp_path: Path, version: str) -> None:
    """Also out again as safetensors, and as a DCP checkpoint."""
    save, layout, parts = FAIRSEQ2[version]
    ranks.run(4, save, tmp_path, layout)
    for place in (tmp_path, tmp_path / "step_2"):
        found = find(place)
        assert (found.kind, found.step, sorted(found.source.tree)) == ("a step of fairseq2", 2, parts)
        assert found.source.tree[parts[2]] == {"position": 12}
        found.source.close()
    model = model_of(tmp_path / "step_2")
    assert alike(model, {name: reference(tmp_path)[name] for name in model})
    assert reference(tmp_path).keys() - model.keys() <= {"model.seen", "model.mean", "model.empty"}
    sc.convert(tmp_path, tmp_path / "run", parts=["model", "optimizer"])
    assert ranks.run(OTHER.ranks, rank_files.resume, tmp_path, OTHER) == [[]] * OTHER.ranks
    for to, again in (("safetensors", tmp_path / "out"), ("dcp", tmp_path / "dcp")):
        sc.convert(tmp_path / "step_2", again, to=to, parts=["model"])
        assert alike(model_of(again), model)
    assert "words.weight" in load_file(tmp_path / "out/model.safetensors")


@pytest.mark.larger
@pytest.mark.parametrize("name", ["FSDP2 x TP", "HSDP"])
def test_a_checkpoint_that_torch_checkpointing_itself_wrote(ranks: Any, tmp_path: Path, name: str) -> None:
    if find_spec("torch_checkpointing") is None:
        pytest.skip("torch_checkpointing is not installed: pip install 'torch_checkpointing==0.1.1'")
    ranks.run(4, rank_files.save_by_torch_checkpointing, tmp_path, LAYOUTS[name])
    assert alike(model_of(tmp_path / "step"), reference(tmp_path))
    sc.convert(tmp_path / "step", tmp_path / "run", step=2)
    assert ranks.run(OTHER.ranks, rank_files.resume, tmp_path, OTHER) == [[]] * OTHER.ranks


TARGETS = {
    "a checkpoint of torch_checkpointing": ("model_0.pt", {"step_0.pt": 3}),
    "a step of fairseq2": ("step_3/model/pp_00/tp_00/sdp_00.pt", {"step_3/trainer/rank_00.pt": {"_step_nr": 3}}),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_model_into_their_folders(tmp_path: Path, kind: str) -> None:
    """Their files hold a model as `torch.save` writes it, on one rank whole."""
    torch.save({"model": MODEL, "optimizer": OPTIMIZER}, tmp_path / "old.pt")
    sc.convert(tmp_path / "old.pt", tmp_path / "run", step=3)
    name, others = TARGETS[kind]
    save(tmp_path / "out", others)
    (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
    sc.convert(tmp_path / "run", tmp_path / "out" / name, to="pt", parts=["model"])
    found = find(tmp_path / "out")
    assert (found.kind, found.step) == (kind, 3)
    assert same(state_of(found.source)["model"], MODEL)
    found.source.close()
    judge = torch.load(tmp_path / "out" / name, weights_only=True)
    assert all(torch.equal(judge[name], value) for name, value in MODEL.items())


def save(place: Path, contents: dict[str, Any]) -> None:
    for name, content in contents.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, place / name)


def test_a_buffer_that_fairseq2_joins_in_rows_is_told_of(tmp_path: Path) -> None:
    """As its own loader does; nothing in the files tells it from a shard."""
    for rank in range(2):
        own = {"w": torch.full((2, 3), float(rank)), "seen": torch.ones(4), "short": torch.ones(1 - rank, 2)}
        save(tmp_path, {f"model/pp_00/tp_00/sdp_{rank:02}.pt": own | {"number": torch.tensor(5)}})
    found = find(tmp_path)
    assert found.notes == ("seen: the same on all 2 ranks, and joined in rows nevertheless, as fairseq2 does",)
    state = state_of(found.source)["model"]
    found.source.close()
    assert {name: list(value.shape) for name, value in state.items()} == {
        "w": [4, 3],
        "seen": [8],
        "short": [1, 2],
        "number": [],
    }
    assert state["w"][:, 0].tolist() == [0, 0, 1, 1]


def test_what_ranks_hold_alike_is_read_once(tmp_path: Path) -> None:
    """DDP: all have the whole. Stages of a pipeline have different keys. Views are compared by what is in them."""
    weight, wide = torch.randn(4, 6), torch.randn(8, 6)
    wide[:4] = weight
    models = [{"w": weight, "first": torch.ones(2)}, {"w": wide[:4], "second": torch.zeros(3)}]
    save(tmp_path, {f"model_{rank}.pt": model for rank, model in enumerate(models)})
    found = model_of(tmp_path)
    assert alike(found, {"model.w": weight, "model.first": torch.ones(2), "model.second": torch.zeros(3)})


MALFORMED: dict[str, tuple[dict[str, Any], type[CheckpointError], str]] = {
    "plain parts of a model": (
        {"model_0.pt": {"w": torch.ones(2)}, "model_1.pt": {"w": torch.zeros(2)}},
        CheckpointLoadError,
        r"model\.w in model_1\.pt is another one",
    ),
    "a rank's file is missing": (
        {"model_0.pt": {"w": torch.ones(2)}, "model_2.pt": {"w": torch.ones(2)}},
        CheckpointLoadError,
        "has model_2.pt, but none of number 1",
    ),
    "other shapes": (
        {"rank_0.pt": {"model": {"w": torch.ones(2)}}, "rank_1.pt": {"model": {"w": torch.ones(3)}}},
        CheckpointLoadError,
        r"model\.w in rank_1\.pt is another one",
    ),
    "no state": (
        {"rank_0.pt": [1, 2], "rank_1.pt": [1, 2]},
        CheckpointDamagedError,
        "no state with parts by name",
    ),
    "of tensor-parallel ranks": (
        {
            "model/pp_00/tp_00/sdp_00.pt": {"w": torch.ones(2)},
            "model/pp_00/tp_01/sdp_00.pt": {"w": torch.zeros(2)},
        },
        CheckpointLoadError,
        r"model\.w in model/pp_00/tp_01/sdp_00\.pt is another one",
    ),
    "rows of other lengths": (
        {
            "model/pp_00/tp_00/sdp_00.pt": {"w": torch.ones(2, 3)},
            "model/pp_00/tp_00/sdp_01.pt": {"w": torch.ones(2, 4)},
        },
        CheckpointError,
        "w",
    ),
    "an empty folder": ({"model/pp_00/x.txt": {}}, CheckpointNotFoundError, "has nothing"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_does_not_join_is_one_clear_error(tmp_path: Path, case: str) -> None:
    contents, kind, told = MALFORMED[case]
    save(tmp_path, contents)
    with pytest.raises(kind, match=told):
        find(tmp_path)


def test_a_part_of_a_model_alone_is_refused(ranks: Any, tmp_path: Path) -> None:
    ranks.run(4, rank_files.save_items, tmp_path, LAYOUTS["FSDP2"])
    with pytest.raises(CheckpointDamagedError, match=r"one rank's part \[.*\] of a tensor"):
        open_source(tmp_path / "step" / "model_1.pt")
    for rank in (3, 2):
        (tmp_path / "step" / f"model_{rank}.pt").unlink()
    with pytest.raises(CheckpointDamagedError, match=r"do not make up .* is the file of a rank missing"):
        open_source(tmp_path / "step", parts=["model"])
