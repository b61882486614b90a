"""Safetensors as the library of that name reads them, and files that were made to do harm."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from shardckpt.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.tools.moving.foreign.safetensors_source import DTYPES, SafetensorsSource
from shardckpt.tools.moving.seam import TensorName, Window
from tests.tools.moving.reading import same, tensors_of

_WIDE = {
    name: torch.arange(24, dtype=torch.uint8).view(getattr(torch, name)).clone()
    for name in DTYPES.values()
    if name not in ("bool", "float8_e8m0fnu")
}
STATE = {
    "model.b.weight": torch.randn(3, 5).to(torch.bfloat16),
    "model.a.weight": torch.randn(7),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "nothing": torch.empty(0, 4),
    "é\n.x": torch.randn(2),
    **_WIDE,
}


@pytest.mark.parametrize("piece", [1 << 20, 7])
def test_one_file_gives_what_the_library_reads(tmp_path: Path, piece: int) -> None:
    save_file(STATE, tmp_path / "model.safetensors", {"format": "pt"})
    source = SafetensorsSource(LocalStorage(tmp_path), "model.safetensors")
    found = tensors_of(source, piece=piece)
    judge = load_file(tmp_path / "model.safetensors")
    assert dict.fromkeys(judge, True) == {name: same(found[name], judge[name]) for name in found}
    assert source.tree == {name: TensorName(name) for name in found}
    assert source.metadata == {"format": "pt"}
    with pytest.raises(ValueError, match="bytes 8 to 12 of scalar"):
        source.read([Window("scalar", 8, memoryview(bytearray(4)))])


def test_an_index_joins_files_in_its_order(tmp_path: Path) -> None:
    names = list(STATE)
    for number in (0, 1):
        save_file({name: STATE[name] for name in names[number::2]}, tmp_path / f"model-{number}.safetensors")
    weight_map = {name: f"model-{names.index(name) % 2}.safetensors" for name in sorted(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    source = SafetensorsSource(LocalStorage(tmp_path), "model.safetensors.index.json")
    assert list(source.tensors) == sorted(names)
    assert all(same(tensor, STATE[name]) for name, tensor in tensors_of(source).items())


def test_what_save_model_leaves_out_is_tied(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    save_model(model, tmp_path / "m.safetensors")
    source = SafetensorsSource(LocalStorage(tmp_path), "m.safetensors")
    assert dict(source.ties) == {"1.weight": "0.weight"}
    assert same(tensors_of(source), dict(model.state_dict()))
    assert set(source.tree) == {"0.weight", "1.weight"}


def file_of(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: tuple[int, ...] = (1,), dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


ATTACKS = {
    "empty": b"",
    "too short": b"\0" * 7,
    "length beyond the file": file_of({}, length=1 << 40),
    "length of 2**64-1": file_of({}, length=(1 << 64) - 1),
    "length above 100 MB": file_of({}, length=100_000_001),
    "no JSON": file_of(b"{nonsense"),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "a list": file_of([]),
    "deep": file_of(b'{"a":' * 100_000),
    "deep lists": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a number for an entry": file_of({"a": 1}),
    "no shape": file_of({"a": {"dtype": "U8", "data_offsets": [0, 0]}}),
    "unknown dtype": file_of({"a": entry(0, 1, dtype="F99")}, b"x"),
    "dtype that is a list": file_of({"a": {**entry(0, 1), "dtype": ["U8"]}}, b"x"),
    "sub-byte dtype": file_of({"a": entry(0, 1, (2,), "F4")}, b"x"),
    "negative size": file_of({"a": entry(0, 1, (-1,))}, b"x"),
    "a size that is a float": file_of(b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', b"x"),
    "a size that is NaN": file_of(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"x"),
    "a huge size": file_of({"a": entry(0, 1, (1 << 62,))}, b"x"),
    "sizes whose product is huge": file_of({"a": entry(0, 1, (1 << 61,) * 60)}, b"x"),
    "too many dimensions": file_of({"a": entry(0, 1, (1,) * 1000)}, b"x"),
    "wrong size": file_of({"a": entry(0, 2)}, b"xx"),
    "outside of the file": file_of({"a": entry(5, 6)}, b"x"),
    "negative offsets": file_of({"a": entry(-1, 0)}, b"x"),
    "backwards": file_of({"a": entry(1, 0)}, b"x"),
    "three offsets": file_of({"a": {**entry(0, 1), "data_offsets": [0, 1, 2]}}, b"x"),
    "overlapping": file_of({"a": entry(0, 2, (2,)), "b": entry(1, 3, (2,))}, b"xxx"),
    "a hole": file_of({"a": entry(0, 1), "b": entry(2, 3)}, b"xxx"),
    "bytes at the end": file_of({"a": entry(0, 1)}, b"xx"),
    "cut off": file_of({"a": entry(0, 8, (8,))}, b"xx"),
    "a name twice": file_of(
        b'{"a":%s,"a":%s}' % (json.dumps(entry(0, 1)).encode(), json.dumps(entry(1, 2)).encode()), b"xx"
    ),
    "a name that is half a letter": file_of(b'{"\\ud800":' + json.dumps(entry(0, 1)).encode() + b"}", b"x"),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_not_well_formed_is_one_error(attack: str) -> None:
    storage = MemoryStorage()
    storage.put("model.safetensors", [ATTACKS[attack]])
    with pytest.raises(CheckpointDamagedError, match=r"model\.safetensors in .* is damaged") as caught:
        SafetensorsSource(storage, "model.safetensors")
    assert len(str(caught.value)) < 1000


INDEXES = {
    "above": {"a": "../secret.safetensors"},
    "absolute": {"a": "/etc/passwd"},
    "inside, then out": {"a": "x/../../secret.safetensors"},
    "a number": {"a": 7},
    "nothing": {},
    "a list": ["a"],
    "not in the file": {"a": "f.safetensors", "b": "f.safetensors"},
}


@pytest.mark.parametrize("attack", INDEXES)
def test_an_index_leads_nowhere_else(attack: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("secret.safetensors", "in/f.safetensors"):
        (tmp_path / name).write_bytes(file_of({"a": entry(0, 1)}, b"x"))
    (tmp_path / "in" / "m.safetensors.index.json").write_text(json.dumps({"weight_map": INDEXES[attack]}))
    with pytest.raises(CheckpointDamagedError):
        SafetensorsSource(LocalStorage(tmp_path / "in"), "m.safetensors.index.json")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(file_of({"a": entry(0, 1)}, b"x"))
    (tmp_path / "in" / "f.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError):
        SafetensorsSource(LocalStorage(tmp_path / "in"), "f.safetensors")


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "f.safetensors"}}))
    for name in ("m.safetensors", "m.safetensors.index.json"):
        with pytest.raises(CheckpointNotFoundError, match=r"\.safetensors in .* is not there"):
            SafetensorsSource(LocalStorage(tmp_path), name)
