"""`.metadata` of DCP: every layout since torch 2.2 is read, and nothing that somebody made to do harm."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import shardckpt as sc
from shardckpt.engine.dcp.foreign.folder import DcpFolder
from shardckpt.format.foreign.dcp import StoredTensor, decode_dcp_metadata
from shardckpt.storage import LocalStorage, MemoryObjects
from shardckpt.tools.moving.dcp_source import DcpSource
from tests.format.restricted.spelling import laughs
from tests.hostile import watch
from tests.hostile.attacks import PICKLES, lying_directory, zip_with
from tests.hostile.mutation import mutate_bytes, mutate_ops, ops_of
from tests.hostile.watch import bounded_memory, watching
from tests.tools.moving.dcp_saved import LAYOUTS, METADATA, blank, differences, edit, save, save_as, state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_earlier_versions_wrote(tmp_path: Path, layout: str) -> None:
    place = save_as(layout, tmp_path / "old")
    found = decode_dcp_metadata((place / METADATA).read_bytes())
    weight = found.entries["model.w"]
    assert isinstance(weight, StoredTensor)
    assert (weight.dtype, weight.shape, weight.is_whole) == ("float32", (60, 100), True)
    assert found.paths["model.w"] == ("model", "w")
    expected, ours = blank(state()), blank(state())
    dcp.load(expected, storage_reader=dcp.FileSystemReader(place))
    dcp.load(ours, storage_reader=sc.DcpReader(place))
    assert differences(state(), expected) == differences(state(), ours) == []


def refused(data: bytes) -> str:
    with bounded_memory() as grown, watching() as seen, pytest.raises(ValueError, match=r".") as caught:
        decode_dcp_metadata(data)
    assert not seen.ran
    assert not seen.noticed
    assert grown() < 256 << 20
    assert len(str(caught.value)) < 2000
    return str(caught.value)


class Reduced:
    def __reduce__(self) -> Any:
        return watch.canary, ("sung",)


def own(**fields: Any) -> Metadata:
    return Metadata(**{"state_dict_metadata": {}, "storage_data": {}, **fields})


class OldPickler(pickle._Pickler):
    """Pickles members of an Enum as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, thing: Any) -> Any:
        return (getattr, (type(thing), thing.name)) if isinstance(thing, Enum) else NotImplemented


@pytest.mark.parametrize("protocol", [2, 4])
def test_members_of_an_enum_by_their_names(sample: dict[str, bytes], protocol: int) -> None:
    file = io.BytesIO()
    OldPickler(file, protocol).dump(pickle.loads(sample[METADATA]))
    assert b"getattr" in file.getvalue()
    assert decode_dcp_metadata(file.getvalue()) == decode_dcp_metadata(sample[METADATA])


@pytest.mark.parametrize("owner", [torch.float32, OrderedDict, torch.Size, Metadata, 3, "text"])
def test_no_other_attribute_is_looked_at(owner: Any) -> None:
    assert "getattr" in refused(pickle.dumps(Attribute(owner), protocol=2))


class Attribute:
    """Becomes an attribute of that when it is loaded."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __reduce__(self) -> Any:
        return getattr, (self.owner, "__class__")


def test_no_pickle_of_an_attacker_is_run() -> None:
    for data in PICKLES:
        refused(data)
        refused(b"\x80\x04" + data[2:])


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "place",
    [
        lambda bad: bad,
        lambda bad: own(state_dict_metadata={"w": bad}),
        lambda bad: own(planner_data=bad),
        lambda bad: own(storage_data={MetadataIndex("w"): bad}),
        lambda bad: own(storage_meta=bad),
    ],
)
def test_a_call_inside_of_it_is_not_made(place: Callable[[Any], Any], protocol: int) -> None:
    refused(pickle.dumps(place(Reduced()), protocol=protocol))


def name(module: str, qualified: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, qualified)) + b"\x93"


_OF_DCP = "torch.distributed.checkpoint.metadata"
_WRONG: dict[str, bytes] = {
    "nothing": b"",
    "a head": b"\x80\x04",
    "the future": b"\x80\x06N.",
    "a frame of 2**60 bytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "a text of 2**60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"N.",
    "a memo of 2**32": b"\x80\x04Nr\xff\xff\xff\xff.",
    "a planner": b"\x80\x04" + name("torch.distributed.checkpoint.default_planner", "DefaultSavePlanner") + b")\x81.",
    "another method": b"\x80\x04" + name(_OF_DCP, "Metadata.__init__") + b")R.",
    "a module's os": b"\x80\x04" + name(_OF_DCP, "os.system") + b"\x8c\x04true\x85R.",
    "a class that is called": b"\x80\x04" + name(_OF_DCP, "Metadata") + b")R.",
    "a class with arguments": b"\x80\x04" + name(_OF_DCP, "Metadata") + b"N\x85\x81.",
    "a class as a value": b"\x80\x04" + name(_OF_DCP, "Metadata") + b".",
    "a state twice": b"\x80\x04" + name(_OF_DCP, "Metadata") + b")\x81}b}b.",
    "a name of laughs": b"\x80\x04" + laughs(40) + b"\x8c\x01x\x93.",
    "a metadata of laughs": b"\x80\x04" + name(_OF_DCP, "Metadata") + b")\x81" + laughs(40) + b"b.",
    "laughs inside": b"\x80\x04"
    + name(_OF_DCP, "Metadata")
    + b")\x81}(\x8c\x13state_dict_metadata}\x8c\x0cstorage_data}\x8c\x0cplanner_data"
    + laughs(40)
    + b"ub.",
    "itself": b"\x80\x04" + name(_OF_DCP, "Metadata") + b")\x81\x94}\x8c\x0cplanner_datah\x00sb.",
}


@pytest.mark.parametrize("data", _WRONG.values(), ids=_WRONG)
def test_what_no_pickler_writes(data: bytes) -> None:
    refused(data)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    place = save(tmp_path_factory.mktemp("dcp") / "sample")
    return {file.name: file.read_bytes() for file in place.iterdir()}


def in_memory(files: dict[str, bytes]) -> MemoryObjects:
    storage = MemoryObjects("run")
    for file, content in files.items():
        storage.put(f"c/{file}", [content])
    return storage


def shorten(metadata: Any) -> None:
    metadata.state_dict_metadata["model.w"].chunks[0].sizes = torch.Size((59, 100))


def overlap(metadata: Any) -> None:
    chunks = metadata.state_dict_metadata["model.w"].chunks
    chunks.append(ChunkStorageMetadata(torch.Size((30, 0)), torch.Size((30, 100))))
    metadata.storage_data[MetadataIndex("model.w", (30, 0))] = metadata.storage_data[MetadataIndex("model.w", (0, 0))]


def info(change: Callable[[_StorageInfo], object]) -> Callable[[Any], object]:
    return lambda metadata: change(metadata.storage_data[MetadataIndex("model.w", (0, 0))])


_LIES: dict[str, tuple[Callable[[Any], object], str]] = {
    "a hole": (shorten, "overlap or leave holes"),
    "twice": (overlap, "overlap or leave holes"),
    "nowhere": (lambda m: m.storage_data.clear(), "_StorageInfo"),
    "outside": (info(lambda i: setattr(i, "relative_path", "../secret")), "not the name of a file inside"),
    "absolute": (info(lambda i: setattr(i, "relative_path", "/etc/passwd")), "not the name of a file inside"),
    "another file": (info(lambda i: setattr(i, "relative_path", "__9_0.distcp")), "is damaged"),
    "past the end": (info(lambda i: setattr(i, "length", 1 << 50)), "the file has only"),
    "elsewhere": (info(lambda i: setattr(i, "offset", 3)), "is damaged"),
    "compressed": (info(lambda i: setattr(i, "transform_descriptors", ["stream.zstd/1"])), "load it with DCP itself"),
    "dtype": (lambda m: setattr(m.state_dict_metadata["model.w"].properties, "dtype", torch.int32), "should be int32"),
    "negative": (info(lambda i: setattr(i, "offset", -1)), "should be a size"),
    "no size": (lambda m: setattr(m.state_dict_metadata["model.w"], "size", torch.Size((-1, 100))), "should be a size"),
    "dimensions": (lambda m: setattr(m.state_dict_metadata["model.w"], "size", torch.Size((6000,))), "dimensions"),
}


@pytest.mark.parametrize(("lie", "said"), _LIES.values(), ids=_LIES)
def test_metadata_that_lies(tmp_path: Path, sample: dict[str, bytes], lie: Callable[[Any], object], said: str) -> None:
    place = tmp_path / "c"
    place.mkdir()
    for file, content in sample.items():
        (place / file).write_bytes(content)
    edit(place, lie)
    content = blank(state())
    content["model"]["w"] = content["model"]["w"].int() if said == "should be int32" else content["model"]["w"]
    with bounded_memory() as grown, pytest.raises(CheckpointException) as caught:
        dcp.load(content, storage_reader=sc.DcpReader(place))
    error = caught.value.failures[0][0]
    assert isinstance(error, sc.CheckpointLoadError)
    assert said in str(error)
    assert grown() < 256 << 20
    assert differences(content["model"]["half"], torch.zeros(7, dtype=torch.bfloat16)) == []


def with_payload(payload: bytes, *, tensor: bool) -> dict[str, bytes]:
    """A checkpoint of one key, "k", which is that payload, as a value or as a tensor of three numbers."""
    entry: Any = BytesStorageMetadata()
    if tensor:
        chunk = ChunkStorageMetadata(torch.Size((0,)), torch.Size((3,)))
        entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((3,)), [chunk])
    index = MetadataIndex("k", (0,) if tensor else None)
    metadata = own(state_dict_metadata={"k": entry}, storage_data={index: _StorageInfo("f", 0, len(payload))})
    return {METADATA: pickle.dumps(metadata), "f": payload}


def saved(tree: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(tree, stream)
    return stream.getvalue()


def members(archive: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return [(info.filename, opened.read(info)) for info in opened.infolist()]


_HARMLESS = {"pickle 14", "pickle 28"}  # a torch.Size of 2**61, and None
_THREE = saved(torch.arange(3.0))
_PAYLOADS: dict[str, bytes] = {
    "nothing": b"",
    "no zip": b"x" * 5000,
    "pressed": zip_with(members(_THREE), deflate=True),
    "twice": zip_with([*members(_THREE), ("archive/data.pkk", b"x")]).replace(b"data.pkk", b"data.pkl"),
    "no pickle": zip_with(members(_THREE)[1:]),
    "cut off": _THREE[:-1],
    "longer": _THREE + b"x",
    "a directory that leads behind it": lying_directory(_THREE, 1 << 31, 1 << 31),
    "a directory that claims all memory": lying_directory(_THREE, 0, (1 << 32) - 2),
    "the other byte order": zip_with([(n, b"big" if n.endswith("byteorder") else c) for n, c in members(_THREE)]),
    "data of another length": zip_with([(n, b"x" * 11 if n.endswith("data/0") else c) for n, c in members(_THREE)]),
    **{
        f"pickle {number}": zip_with([("archive/data.pkl", attack), *members(_THREE)[1:]])
        for number, attack in enumerate(PICKLES)
    },
}


@pytest.mark.parametrize("tensor", [False, True], ids=["value", "tensor"])
def test_payloads_of_an_attacker(tensor: bool) -> None:
    read_all(with_payload(_THREE, tensor=tensor))
    for what, payload in _PAYLOADS.items():
        storage = in_memory(with_payload(payload, tensor=tensor))
        said = "" if what in _HARMLESS and not tensor else "nothing"
        with bounded_memory() as grown, watching() as seen:
            try:
                DcpSource(storage, folder="c").read([])
                read_all(with_payload(payload, tensor=tensor))
            except sc.CheckpointError as error:
                said = str(error)
        assert said != "nothing", f"{what} was read"
        assert len(said) < 2000, what
        assert not seen.ran, what
        assert not seen.noticed, (what, seen.noticed)
        assert grown() < 256 << 20, what


def read_all(files: dict[str, bytes]) -> None:
    folder = DcpFolder(in_memory(files), "c")
    entries = folder.metadata.entries
    folder.check_whole(entries)
    tensors = [entry for entry in entries.values() if isinstance(entry, StoredTensor)]
    folder.locate({c.payload: (entry.dtype, c) for entry in tensors for c in entry.chunks})
    dict(folder.live_values(entries))


def test_files_changed_at_random_give_errors_of_ours(sample: dict[str, bytes]) -> None:
    read_all(sample)
    rng, refusals = Random(4), 0
    ops = ops_of(sample[METADATA])
    data = next(name for name in sample if name != METADATA)
    with bounded_memory() as grown, watching() as seen:
        for case in range(400):
            changed = dict(sample)
            if case % 2:
                mutated = mutate_ops(rng, ops, [ops])
                changed[METADATA] = b"".join(mutated) if case % 4 == 1 else mutate_bytes(rng, sample[METADATA])
            else:
                changed[data] = mutate_bytes(rng, sample[data][:4000]) + sample[data][4000:]
            try:
                read_all(changed)
            except sc.CheckpointError:
                refusals += 1
    assert refusals > 100
    assert not seen.ran
    assert not seen.noticed
    assert grown() < 256 << 20


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ({"x": b""}, sc.CheckpointNotFoundError, "none of DCP's"),
        ({"__0.metadata": b""}, sc.CheckpointLoadError, "use_collectives=False"),
        ({METADATA: b"\x80\x04N."}, sc.CheckpointDamagedError, "cannot be read"),
    ],
)
def test_what_is_no_checkpoint_of_dcp(files: dict[str, bytes], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        DcpFolder(in_memory(files), "c")


def test_a_value_that_needs_code_is_refused_only_when_it_is_asked_for(tmp_path: Path) -> None:
    place = save(tmp_path / "c", {"w": torch.ones(3), "bad": Reduced(), "good": 5})
    content = {"w": torch.zeros(3), "good": 0}
    with watching(tmp_path) as seen:
        dcp.load(content, storage_reader=sc.DcpReader(place))
        assert content["good"] == 5
        with pytest.raises(CheckpointException, match="bad was saved as something"):
            dcp.load({"bad": 0}, storage_reader=sc.DcpReader("c", storage=LocalStorage(tmp_path)))
    assert not seen.ran


def test_a_buffer_comes_back_as_one(tmp_path: Path) -> None:
    """As the training state of some programs has it."""
    place = save(tmp_path / "c", {"losses": io.BytesIO(b"abc\xff"), "steps": 3})
    content: dict[str, Any] = {"losses": io.BytesIO(), "steps": 0}
    dcp.load(content, storage_reader=sc.DcpReader(place))
    assert content["losses"].getvalue() == b"abc\xff"
    source = DcpSource(place)
    assert source.tree == {"losses": b"abc\xff", "steps": 3}
    source.close()


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path) -> None:
    """DCP itself loads it."""
    place = save(tmp_path / "c", {"w": torch.arange(1000.0)})
    file = place / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[data.index(struct.pack("<f", 500.0))] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointException, match="not those that were written"):
        dcp.load({"w": torch.zeros(1000)}, storage_reader=sc.DcpReader(place))


def test_sums_that_were_switched_off_are_not_missed(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        place = save(tmp_path / "c")
    finally:
        torch.serialization.set_crc32_options(True)
    content = blank(state())
    dcp.load(content, storage_reader=sc.DcpReader(place))
    assert differences(state(), content) == []
