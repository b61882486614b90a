"""DCP's own checkpoints as a source and as a sink; torch's own save, load and converter are the judges."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardckpt as sc
from shardckpt.format.foreign.nesting import nest
from shardckpt.storage import LocalStorage, MemoryObjects, MemoryStorage, StorageWrapper, open_storage
from shardckpt.testing.faults import CountingStorage, FailingStorage, flip_byte, on
from shardckpt.testing.pool import ProcessPool
from shardckpt.tools.moving import dcp_sink, dcp_source
from shardckpt.tools.moving.dcp_sink import DcpSink
from shardckpt.tools.moving.dcp_source import DcpSource, is_dcp
from shardckpt.tools.moving.seam import TensorFacts, TensorName, TensorSource, Window
from tests.tools.moving.dcp_saved import LAYOUTS, METADATA, blank, differences, edit, save, save_as, state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")


def tensor_of(source: TensorSource, name: str, step: int = 1 << 40) -> torch.Tensor:
    """The tensor, read in windows of so many bytes, in any order."""
    facts = source.tensors[source.ties.get(name, name)]
    data = bytearray(facts.nbytes)
    view = memoryview(data)
    windows = [Window(name, at, view[at : at + step]) for at in range(0, len(data), step)]
    Random(2).shuffle(windows)
    source.read(windows)
    whole = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return whole.view(getattr(torch, facts.dtype)).view(facts.shape)


def whole(source: TensorSource, node: Any, step: int = 1 << 40) -> Any:
    """The state again."""
    if type(node) is TensorName:
        return tensor_of(source, node.name, step)
    if isinstance(node, dict):
        return {key: whole(source, item, step) for key, item in node.items()}
    if type(node) in (list, tuple):
        return type(node)([whole(source, item, step) for item in node])
    return node


def like(wanted: Any, found: Any) -> Any:
    """The same with the keys of dicts in the order that is wanted: DCP puts values before tensors."""
    if isinstance(wanted, dict) and isinstance(found, dict) and set(wanted) == set(found):
        return {key: like(value, found[key]) for key, value in wanted.items()}
    return found


class Held:
    """A source over live tensors."""

    def __init__(
        self, content: dict[str, torch.Tensor], tree: Any = None, ties: Mapping[str, str] | None = None
    ) -> None:
        self.content = {name: tensor.contiguous() for name, tensor in content.items()}
        self.tensors = {name: TensorFacts(str(t.dtype)[6:], tuple(t.shape)) for name, t in content.items()}
        self.ties = dict(ties or {})
        self.tree = {name: TensorName(name) for name in (*content, *self.ties)} if tree is None else tree
        self.largest = 0

    def read(self, windows: Sequence[Window]) -> None:
        for window in windows:
            self.largest = max(self.largest, len(window.into))
            flat = self.content[window.name].reshape(-1).view(torch.uint8).numpy()
            window.into[:] = flat[window.start : window.start + len(window.into)].tobytes()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("step", [1 << 40, 1000, 61])
def test_a_source_gives_what_was_saved(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_source, "_PIECE", 300)
    place = save(tmp_path / "c")
    assert is_dcp(os.listdir(place))
    source = DcpSource(place)
    assert source.tensors["model.w"] == TensorFacts("float32", (60, 100))
    found = whole(source, source.tree, step)
    assert differences(state(), like(state(), found)) == []
    source.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_older_layouts_come_too(tmp_path: Path, layout: str) -> None:
    source = DcpSource(save_as(layout, tmp_path / "c"))
    assert source.tree["groups"] == state()["groups"]
    assert differences(state()["model"]["turned"], tensor_of(source, "model.turned")) == []
    source.close()


def save_mesh(rank: int, world: int, folder: Path, place: Path, shape: tuple[int, ...], placements: Any) -> None:
    mesh = init_device_mesh("cpu", shape)
    full = torch.arange(13 * 10, dtype=torch.float64).view(13, 10)
    small = torch.arange(3.0)  # fewer rows than ranks: some have nothing
    content = {
        "w": distribute_tensor(full, mesh, placements),
        "b": distribute_tensor(small, mesh, [Shard(0)] * len(shape)),
        "alike": torch.ones(2),
        "opt": {"state": [{"step": 3}], "m": distribute_tensor(full * 2, mesh, placements)},
    }
    dcp.save(content, storage_writer=dcp.FileSystemWriter(place, thread_count=2))


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((2,), [Shard(0)]),
        ((2,), [Shard(1)]),
        ((2, 2), [Shard(0), Shard(1)]),
        ((2, 2), [Replicate(), Shard(0)]),
        ((4,), [Shard(1)]),
    ],
)
def test_meshes_of_other_jobs(ranks: ProcessPool, tmp_path: Path, shape: tuple[int, ...], placements: Any) -> None:
    world = torch.Size(shape).numel()
    ranks.run(world, save_mesh, tmp_path / "c", shape, placements)
    source = DcpSource(tmp_path / "c")
    full = torch.arange(130.0, dtype=torch.float64).view(13, 10)
    for step in (1 << 40, 96):
        assert torch.equal(tensor_of(source, "w", step), full)
        assert torch.equal(tensor_of(source, "opt.m", step), full * 2)
        assert tensor_of(source, "b", step).tolist() == [0, 1, 2]
    assert source.tree["opt"]["state"] == [{"step": 3}]
    source.close()
    content = {"w": torch.zeros(13, 10, dtype=torch.float64), "b": torch.zeros(3)}
    dcp.load(content, storage_reader=sc.DcpReader(tmp_path / "c"))
    assert torch.equal(content["w"], full)
    assert content["b"].tolist() == [0, 1, 2]


def test_what_torch_wrote_to_any_url_is_read_there() -> None:
    url = "memory://dcp-moving/run/c"
    dcp.save(state(), storage_writer=FsspecWriter(url))
    content = blank(state())
    dcp.load(content, storage_reader=sc.DcpReader(url))
    assert differences(state(), content) == []
    source = DcpSource(url)
    DcpSink("memory://dcp-moving/run/d").write(source, budget_nbytes=1 << 20)
    source.close()
    again = blank(state())
    dcp.load(again, storage_reader=FsspecReader("memory://dcp-moving/run/d"))
    assert differences(state(), again) == []
    storage = open_storage("memory://dcp-moving")
    storage.delete_tree("run")
    storage.close()


def test_a_source_needs_only_small_reads_to_find_the_bytes(tmp_path: Path) -> None:
    save(tmp_path / "c", {f"t{i}": torch.full((40_000,), float(i)) for i in range(8)})
    storage = CountingStorage(LocalStorage(tmp_path))
    source = DcpSource(storage, folder="c")
    before = storage.total_nbytes
    assert tensor_of(source, "t5").unique().tolist() == [5]
    assert storage.total_nbytes - before < 160_000 + 10_000
    source.close()


def test_damage_is_found_also_when_it_is_read_in_pieces(tmp_path: Path) -> None:
    save(tmp_path / "c", {"w": torch.arange(1000.0), "v": torch.ones(7)})
    data = (tmp_path / "c" / "__0_0.distcp").read_bytes()
    flip_byte(tmp_path / "c" / "__0_0.distcp", data.index(torch.tensor([500.0]).numpy().tobytes()))
    source = DcpSource(tmp_path / "c")
    assert tensor_of(source, "v").sum() == 7
    for step in (1 << 40, 100):
        with pytest.raises(sc.CheckpointDamagedError, match="not those that were written"):
            tensor_of(source, "w", step)
    source.close()


def test_a_source_says_what_it_cannot_give(tmp_path: Path) -> None:
    place = save(tmp_path / "c", {"w": torch.arange(8.0), "bad": range(3)})
    with pytest.raises(sc.CheckpointLoadError, match="bad was saved as something that cannot be loaded"):
        DcpSource(place)
    edit(place, lambda m: setattr(m.state_dict_metadata["w"].chunks[0], "sizes", torch.Size((7,))))
    with pytest.raises(sc.CheckpointDamagedError, match="chunks of w overlap or leave holes"):
        DcpSource(place)


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ({"a": ("a", 1 << 40)}, "far longer"),
        ({"a": (0,)}, "a state that is a list"),
        ({"a": ("x",), "b": ("x", "y")}, "inside of another"),
        ({"a": ("x", "y"), "b": ("x",)}, "where something else"),
        ({"a": ("x", 0), "b": ("x", "y")}, "both a list and a dict"),
        ({"a": ("x", -1)}, "both a list and a dict"),
    ],
)
def test_paths_that_contradict_each_other(paths: dict[str, tuple[str | int, ...]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        nest(dict.fromkeys(paths, 1), paths)


def test_torch_loads_what_a_sink_wrote(tmp_path: Path) -> None:
    source = DcpSource(save(tmp_path / "c"))
    DcpSink(tmp_path / "d").write(source, budget_nbytes=4000)
    source.close()
    content = blank(state())
    dcp.load(content, storage_reader=dcp.FileSystemReader(tmp_path / "d"))
    assert differences(state(), content) == []
    dcp_to_torch_save(tmp_path / "d", tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt", weights_only=False)  # b"" is refused otherwise
    assert differences(state(), like(state(), one)) == []
    ours = blank(state())
    dcp.load(ours, storage_reader=sc.DcpReader(tmp_path / "d"))
    assert differences(state(), ours) == []


def test_a_sink_keeps_to_its_budget_and_cuts_what_is_larger(tmp_path: Path) -> None:
    wide, tall = torch.arange(6000.0).view(2, 3000), torch.arange(6000.0).view(1500, 4)
    source = Held({"wide": wide, "tall": tall, "cube": torch.arange(60.0).view(3, 4, 5), "one": torch.tensor(3.0)})
    DcpSink(tmp_path / "d").write(source, budget_nbytes=4096)
    assert source.largest <= 1024
    metadata = dcp.FileSystemReader(tmp_path / "d").read_metadata()
    assert len(metadata.state_dict_metadata["tall"].chunks) == 24  # type: ignore[union-attr]
    assert metadata.version == "1.0.0"
    content = {name: torch.zeros_like(tensor) for name, tensor in source.content.items()}
    dcp.load(content, storage_reader=dcp.FileSystemReader(tmp_path / "d"))
    assert differences(source.content, content) == []


def test_tied_tensors_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    source = Held({"w": torch.arange(50_000.0)}, ties={"head": "w"})
    DcpSink(tmp_path / "d").write(source, budget_nbytes=1 << 20)
    assert sum(file.stat().st_size for file in (tmp_path / "d").iterdir()) < 250_000
    content = {"w": torch.zeros(50_000), "head": torch.zeros(50_000)}
    dcp.load(content, storage_reader=dcp.FileSystemReader(tmp_path / "d"))
    assert torch.equal(content["head"], source.content["w"])
    again = DcpSource(tmp_path / "d")
    assert (dict(again.ties), list(again.tensors)) == ({"head": "w"}, ["w"])
    assert torch.equal(tensor_of(again, "head"), source.content["w"])
    again.close()


def test_files_are_closed_when_they_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_sink, "_FILE_NBYTES", 9000)
    source = Held({f"t{i}": torch.full((1000,), float(i)) for i in range(6)})
    DcpSink(tmp_path / "d").write(source, budget_nbytes=1 << 20)
    assert sorted(os.listdir(tmp_path / "d")) == [METADATA, "__0_0.distcp", "__0_1.distcp", "__0_2.distcp"]
    content = {name: torch.zeros(1000) for name in source.content}
    dcp.load(content, storage_reader=dcp.FileSystemReader(tmp_path / "d"))
    assert differences(source.content, content) == []


def test_what_dcp_flattens_is_flattened_alike() -> None:
    tree = {
        "a": {1: {"x": TensorName("t")}, "none": {}},
        "l": [[1, 2], [{"k": 5}, TensorName("t")]],
        "t": (TensorName("t"), {"in": TensorName("t")}),
        "o": [],
    }
    storage = MemoryStorage("run")
    DcpSink(storage, folder="d").write(Held({"t": torch.arange(3.0)}, tree), budget_nbytes=1 << 20)
    source = DcpSource(storage, folder="d")
    found = whole(source, source.tree)
    x = torch.arange(3.0)
    expected = {"a": {"1": {"x": x}, "none": {}}, "l": [[1, 2], [{"k": 5}, x]], "t": (x, {"in": x}), "o": []}
    assert differences(expected, like(expected, found)) == []


def test_a_sink_leaves_what_is_there_alone(tmp_path: Path) -> None:
    place = save(tmp_path / "c")
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    with pytest.raises(sc.CheckpointSaveError, match="is not empty"):
        DcpSink(place).write(Held({"w": torch.ones(5)}), budget_nbytes=1 << 20)
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before
    objects = MemoryObjects("run")
    objects.put("d/__0_0.distcp", [b"of another, who came at the same time"])
    with pytest.raises(sc.CheckpointSaveError, match="was not written"):
        DcpSink(Unlisted(objects), folder="d").write(Held({"w": torch.ones(5)}), budget_nbytes=1 << 20)
    assert objects.list("d") == ["__0_0.distcp"]


class Unlisted(StorageWrapper):
    """Lists nothing: as it was a moment ago."""

    def list(self, prefix: str = "") -> list[str]:
        return []


def test_a_sink_writes_all_or_nothing(tmp_path: Path) -> None:
    source = Held({"w": torch.ones(5000)})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_bytes(b"mine")
    with pytest.raises(sc.CheckpointSaveError, match="is not empty"):
        DcpSink(tmp_path / "full").write(source, budget_nbytes=1 << 20)
    assert os.listdir(tmp_path / "full") == ["x"]
    objects = MemoryObjects("run")
    storage = FailingStorage(objects, on("put", METADATA))
    with pytest.raises(sc.CheckpointSaveError, match="was not written"):
        DcpSink(storage, folder="d").write(source, budget_nbytes=1 << 20)
    assert objects.list("d") == []
    with pytest.raises(sc.InvalidStateError, match="fn cannot be stored"):
        DcpSink(objects, folder="d").write(Held({}, {"fn": print}), budget_nbytes=1 << 20)
    assert objects.list("d") == []
    with pytest.raises(sc.InvalidStateError, match="two keys"):
        DcpSink(objects, folder="d").write(Held({}, {"a": {"b": 1}, "a.b": 2}), budget_nbytes=1 << 20)
