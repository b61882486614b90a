"""Files of `torch.save` as `torch.load` reads them, and what pickles and archives do that were made to do harm."""

from __future__ import annotations

import io
import json
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardckpt.errors import CheckpointDamagedError
from shardckpt.format.index import ITEMSIZE
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryStorage
from shardckpt.tools.moving.foreign.archive_source import ArchiveSource
from shardckpt.tools.moving.seam import Window
from tests.format.restricted.spelling import FLOATS, HEAD, call, laughs, number, text
from tests.hostile.attacks import PICKLES, lying_directory, zip_with
from tests.hostile.watch import watching
from tests.tools.moving.reading import same, state_of, tensors_of


def saved(state: Any, **options: Any) -> MemoryStorage:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return holding(buffer.getvalue())


def holding(content: bytes) -> MemoryStorage:
    storage = MemoryStorage()
    storage.put("f.pt", [content])
    return storage


def training_state() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 4))
    model[2].bias = model[2].bias  # an OrderedDict with _metadata
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for _ in range(2):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    return {
        "model": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 3,
        "nested": [1, ({"deep": torch.arange(3)}, 2.5), [torch.tensor(1.0), None]],
        "values": [Counter(a=2), {1, 2}, b"bytes", torch.Size([2]), torch.float16, 1 << 80, (), "é"],
        "odd keys": {0: torch.zeros(1), 2.5: torch.ones(1), ("a", 1): torch.ones(2), None: 1},
    }


@pytest.mark.parametrize(("piece", "protocol"), [(1 << 20, 2), (13, 2), (1 << 20, 4), (1 << 20, 5)])
def test_a_training_state_comes_as_torch_load_gives_it(piece: int, protocol: int) -> None:
    """Of the protocol that is torch's own, and those of programs that ask for another (fairseq2)."""
    storage = saved(training_state(), pickle_protocol=protocol)
    source = ArchiveSource(storage, "f.pt")
    judge = torch.load(io.BytesIO(storage.read("f.pt")), weights_only=protocol == 2)
    assert same(state_of(source, piece=piece), _with_plain_dicts(judge))
    assert source.ties["parameters.0.weight"] == "model.0.weight"
    assert list(source.tensors)[:3] == ["model.0.weight", "model.0.bias", "model.1.weight"]


def _with_plain_dicts(tree: Any) -> Any:
    if isinstance(tree, torch.nn.Parameter):
        return tree.data
    if isinstance(tree, OrderedDict) or type(tree) is dict:
        return {key: _with_plain_dicts(value) for key, value in tree.items()}
    return type(tree)(map(_with_plain_dicts, tree)) if type(tree) in (list, tuple) else tree


def test_every_dtype_of_torch_comes_bit_for_bit() -> None:
    content = torch.arange(48, dtype=torch.uint8)
    names = [name for name in ITEMSIZE if "bits" not in name and "complex32" not in name and "float4" not in name]
    state = {name: content.clone().view(getattr(torch, name)) for name in names if name != "bool"}
    state["bool"] = torch.tensor([True, False])
    assert same(tensors_of(ArchiveSource(saved(state), "f.pt")), state)


def _views() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 8, 10)
    odd = torch.arange(31, dtype=torch.int16)
    return {
        "base": base,
        "same": base,
        "rows": base[1:3],
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 2, 0)[2:7, ::3],
        "every second": odd[1::2],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "scalar in it": base[3, 4, 5],
        "empty": base[:, :0].transpose(0, 2),
        "one wide": torch.randn(1, 7)[:, ::7],
        "bfloat16": torch.randn(9, 4).to(torch.bfloat16).t(),
        "complex": torch.randn(4, 3, dtype=torch.complex128).t(),
    }


@pytest.mark.parametrize("gathered", [64 << 20, 300, 1])
@pytest.mark.parametrize("piece", [1 << 20, 129])
def test_views_of_any_strides_come_row_by_row(gathered: int, piece: int) -> None:
    state = _views()
    source = ArchiveSource(saved(state), "f.pt", gathered_nbytes=gathered)
    assert same(state_of(source, piece=piece), state)
    assert dict(source.ties) == {"same": "base"}


def test_no_more_of_a_storage_is_in_memory_at_once_than_was_said() -> None:
    class Counting(MemoryStorage):
        most = 0

        def read_into(self, reads: Any) -> None:
            self.most = max(self.most, *(len(read.into) for read in reads), 0)
            super().read_into(reads)

    buffer, storage = io.BytesIO(), Counting()
    big = torch.randn(500, 600)
    torch.save({"w": big.t()}, buffer)
    storage.put("f.pt", [buffer.getvalue()])
    source = ArchiveSource(storage, "f.pt", gathered_nbytes=64 << 10)
    storage.most = 0
    assert same(tensors_of(source, piece=32 << 10)["w"], big.t())
    assert 0 < storage.most <= 64 << 10


def test_files_of_an_index_are_joined_in_its_order(tmp_path: Path) -> None:
    state = {f"layer.{number}": torch.randn(3, number + 1) for number in range(6)}
    names = list(state)
    for part in (0, 1):
        torch.save({name: state[name] for name in names[part::2]}, tmp_path / f"pytorch_model-{part}.bin")
    weight_map = {name: f"pytorch_model-{at % 2}.bin" for at, name in enumerate(names)}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    source = ArchiveSource(LocalStorage(tmp_path), index.name)
    assert list(source.tensors) == names
    assert same(tensors_of(source), state)
    index.write_text(json.dumps({"weight_map": {**weight_map, "gone": "pytorch_model-0.bin"}}))
    with pytest.raises(CheckpointDamagedError, match=r"says that pytorch_model-0\.bin has gone, but it has not"):
        ArchiveSource(LocalStorage(tmp_path), index.name)


def test_random_states_with_arrays_of_numpy_come_as_numbers() -> None:
    state = {"numpy": np.random.get_state(), "python": random.getstate(), "cpu": torch.get_rng_state()}
    state |= {"loss": np.float64(2.5), "empty": b""}  # the latter torch.load does not give back either
    found = state_of(ArchiveSource(saved(state), "f.pt"))
    kind, keys, *rest = state["numpy"]
    assert found["numpy"] == (kind, keys.tolist(), *rest)
    assert found["python"] == state["python"]
    assert (found["loss"], found["empty"]) == (2.5, b"")
    assert same(found["cpu"], state["cpu"])


def test_a_flipped_bit_is_found_when_a_storage_is_read_whole() -> None:
    good = saved({"w": torch.zeros(1000), "v": torch.ones(500).view(20, 25).t()}).read("f.pt")
    for mark in (torch.zeros(100), torch.ones(100)):
        at = good.index(mark.numpy().tobytes()) + 77
        source = ArchiveSource(holding(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]), "f.pt")
        with pytest.raises(CheckpointDamagedError, match=r"the bytes of data/. are not what their CRC says"):
            tensors_of(source, piece=333)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: saved({"w": torch.ones(2)}, _use_new_zipfile_serialization=False), "before 1.6.*save it again"),
        (lambda: holding(b"\x80\x02}q\x00."), "no zip archive of torch.save"),
        (lambda: holding(b""), "no zip archive"),
        (lambda: saved({"w": torch.randn(2, dtype=torch.complex64).conj()}), "resolve_conj"),
        (lambda: saved({"w": torch.eye(2).to_sparse()}), "not on the allow-list"),
        (lambda: saved(torch.nn.Linear(2, 2)), "not on the allow-list"),
        (lambda: saved({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}), r"both called 'a\.b'"),
        (lambda: saved({"a": np.ones((2, 2))}), "no plain row of numbers"),
        (lambda: saved({"a": np.array(["x"])}), "other things than plain numbers"),
        (lambda: saved({"w": torch.ones(1)}, pickle_protocol=3), "protocol 2 or 4 or 5"),
    ],
)
def test_what_is_not_read_says_why(make: Callable[[], MemoryStorage], says: str) -> None:
    with pytest.raises(CheckpointDamagedError, match=says):
        ArchiveSource(make(), "f.pt")


def archive(tree: bytes, *more: tuple[str, bytes]) -> bytes:
    return zip_with(
        [("archive/data.pkl", tree), ("archive/data/0", b"x" * 16), ("archive/byteorder", b"little"), *more]
    )


def _pid(numel: int, key: str = "0") -> bytes:
    return b"(" + text("storage") + FLOATS + text(key) + text("cpu") + number(numel) + b"tQ"


def _tensor(numel: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    sizes, strides = (b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride))
    rest = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + _pid(numel, key) + number(offset) + sizes + strides + rest + b"tR"


_IN_DICT = (
    _tensor(4, 0, (5,), (1,)),
    _tensor(4, 1, (4,), (1,)),
    _tensor(4, -1, (1,), (1,)),
    _tensor(4, 0, (2,), (-1,)),
    _tensor(4, 0, (2, 2), (1,)),
    _tensor(4, 0, (1 << 40,), (0,)),
    _tensor(4, 0, (1 << 61, 1 << 61), (0, 0)),
    _tensor(5, 0, (5,), (1,)),
    _tensor(1 << 40, 0, (1 << 40,), (1,)),
    _tensor(4, 0, (4,), (1,), key="../../etc/passwd"),
    call("torch._utils", "_rebuild_parameter", b"N", b"\x88", b"N"),
    call("torch._tensor", "_rebuild_from_type_v2", b"cos\nsystem\n", b"ctorch\nTensor\n", b")", b"N"),
    call("torch._tensor", "_rebuild_from_type_v2", b"cbuiltins\nset\n", b"ctorch\nTensor\n", b")", b"N"),
    call("torch", "Tensor", number(1 << 40)),
    call("numpy", "ndarray", number(1 << 40)),
    call("numpy", "dtype", text("O")),
    call("numpy", "dtype", text("u4")),
    call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n", number(1 << 40)),
    call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("u4")), text("abcd")),
    call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n") + b"(K\x01" + laughs(30) + b"NNNtb",
    laughs(22, _tensor(4, 0, (4,), (1,))),
)
_GOOD = HEAD + b"}" + text("a") + _tensor(4, 0, (2, 2), (1, 2)) + b"s."
TREES = [HEAD + b"}" + text("a") + body + b"s." for body in _IN_DICT] + list(PICKLES)


@pytest.mark.parametrize("number_", range(len(TREES)))
def test_pickles_that_do_harm_do_nothing(number_: int) -> None:
    storage, told = holding(archive(TREES[number_])), ""
    tensors_of(ArchiveSource(holding(archive(_GOOD)), "f.pt"))  # what is imported at first use is imported now
    with watching() as seen:
        try:
            tensors_of(ArchiveSource(storage, "f.pt"))
        except CheckpointDamagedError as error:
            told = str(error)
    assert not seen.ran
    assert not seen.noticed
    assert len(told) < 2000


def _zips() -> dict[str, bytes]:
    tree = b"\x80\x02}."
    plain = [("archive/data.pkl", tree), ("archive/data/0", b"x" * 64)]
    good = zip_with(plain)
    return {
        "cut off": good[:-30],
        "only the beginning": good[:10],
        "no tree": zip_with(plain[1:]),
        "two trees": zip_with([*plain, ("other/data.pkl", tree)]),
        "a tree that is deep": zip_with([("a/b/data.pkl", tree)]),
        "compressed": zip_with([("archive/data.pkl", tree * 1000)], deflate=True),
        "big endian": archive(tree, ("archive/x", b"")).replace(b"little", b"big..."),
        "TorchScript": zip_with([*plain, ("archive/constants.pkl", tree)]),
        "a wrong CRC": good.replace(tree, b"\x80\x02]."),
        **{
            f"lies {at} {size}": lying_directory(good, at, size)
            for at in (0, 70, 1 << 31, -1)
            for size in (0, 1 << 31, -1)
        },
    }


@pytest.mark.parametrize("attack", _zips())
def test_archives_that_lie_are_one_error(attack: str) -> None:
    with pytest.raises(CheckpointDamagedError):
        ArchiveSource(holding(_zips()[attack]), "f.pt")


def test_a_bomb_of_shared_bytes_is_refused() -> None:
    body = b"}(" + b"".join(text(f"t{n}") + _tensor(4, 0, (1 << 20, n + 1), (0, 0)) for n in range(40)) + b"u."
    with pytest.raises(CheckpointDamagedError, match="are said to make tensors of"):
        ArchiveSource(holding(archive(HEAD + body)), "f.pt")


def test_a_window_stays_in_its_tensor_and_reads_nothing_else() -> None:
    source = ArchiveSource(saved({"w": torch.arange(4)}), "f.pt")
    into = bytearray(8)
    source.read([Window("w", 24, memoryview(into)), Window("w", 0, memoryview(bytearray()))])
    assert int.from_bytes(into, "little") == 3
    with pytest.raises(ValueError, match="bytes 25 to 33 of w"):
        source.read([Window("w", 25, memoryview(into))])
