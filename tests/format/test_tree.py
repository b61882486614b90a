"""`data.pkl`: what goes in comes out, here and in torch; what torch would not give back is refused by name."""

from __future__ import annotations

import collections
import datetime
import enum
import io
import math
import pathlib
import random
import threading
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.format.tree import (
    MAX_LEVELS,
    TensorRef,
    UnsafeValueError,
    check_value,
    decode_tree,
    encode_tree,
    map_leaves,
)
from tests.format.images import DTYPES, build_image, is_same

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 2039), (1 << 2039) - 1),
    st.integers(-300, 70_000),
    st.floats(),
    st.text(),
    st.binary(max_size=20),
)
KEYS = st.one_of(st.text(max_size=5), st.integers(-5, 300), st.booleans(), st.none(), st.binary(max_size=3))
VALUES = st.recursive(
    SCALARS | st.sets(st.integers() | st.text(max_size=3) | st.binary(max_size=2), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=12,
)
REFS = st.builds(
    TensorRef,
    st.integers(0, 1 << 20),
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
)
TREES = st.recursive(
    REFS | VALUES,
    lambda inner: (
        st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=20,
)


class Colour(enum.IntEnum):
    RED = 1


class Names(list):
    pass


class Pretender:
    """Comes back as something else."""

    def __reduce__(self) -> Any:
        return collections.OrderedDict, ()


class Raising:
    def __reduce__(self) -> Any:
        raise KeyError("no")


class Setting:
    """A user's own class, good for `add_safe_globals`."""

    def __init__(self, rate: float) -> None:
        self.rate = rate


pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

Point = collections.namedtuple("Point", "x y")


def torch_round_trip(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def as_decoded(tree: Any) -> Any:
    """What `decode_tree` is to give for a tree of refs."""
    if isinstance(tree, TensorRef):
        return torch.empty(tree.shape, dtype=tree.dtype, device="meta")
    if type(tree) is dict:
        return {key: as_decoded(item) for key, item in tree.items()}
    return type(tree)(map(as_decoded, tree)) if type(tree) in (list, tuple) else tree


def same_tree(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        alike = isinstance(right, torch.Tensor) and right.is_meta and left.stride() == right.stride()
        return alike and (left.dtype, left.shape) == (right.dtype, right.shape)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same_tree(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_tree, left, right))
    return is_same(left, right)


@given(TREES)
@settings(max_examples=150, deadline=None)
def test_a_tree_comes_back(tree: Any) -> None:
    assert same_tree(as_decoded(tree), decode_tree(encode_tree(tree)))


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_plain_values_are_accepted_and_torch_gives_them_back(value: Any) -> None:
    check_value(value)
    image = build_image({"value": value, "weight": torch.ones(2)})
    assert is_same(value, torch.load(io.BytesIO(image.content), weights_only=True)["value"])


@pytest.mark.parametrize(
    "value",
    [
        Counter("abca"),
        OrderedDict(a=[1], b=(2,)),
        torch.Size([2, 3]),
        torch.device("cuda", 1),
        torch.device("cpu"),
        torch.bfloat16,
        torch.uint16,
        torch.strided,
        torch.per_tensor_affine,
        complex(1, -2),
        bytearray(b"ab"),
        bytearray(),
        {"generator": random.Random(3).getstate()},
        [{"nested": (torch.Size([1]), {"deep": torch.float32})}],
    ],
    ids=repr,
)
def test_what_torch_gives_back_is_accepted(value: Any) -> None:
    assert torch_round_trip(value) == value
    check_value(value)
    back = decode_tree(encode_tree(value))
    assert (type(back), back) == (type(value), value)
    image = build_image({"value": [value, torch.ones(1)]})
    assert torch.load(io.BytesIO(image.content), weights_only=True)["value"][0] == value


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float32(1), "numpy.float32"),
        (np.zeros(2), "numpy.ndarray"),
        (lambda: 0, "builtins.function"),
        (Colour.RED, "Colour"),
        (Names([1]), "Names"),
        (Point(1, 2), "Point"),
        (Setting(0.1), "Setting"),
        (Pretender(), "Pretender"),
        (Raising(), "Raising"),
        (frozenset({1}), "builtins.frozenset"),
        (collections.defaultdict(int), "collections.defaultdict"),
        (collections.deque([1]), "collections.deque"),
        (range(3), "builtins.range"),
        (datetime.timedelta(1), "datetime.timedelta"),
        (pathlib.PurePosixPath("a"), "PurePosixPath"),
        (1 << 2039, "builtins.int"),
        (-(1 << 2040), "builtins.int"),
        (threading.Lock(), "lock"),
        (torch.Generator(), "torch._C.Generator"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (int, "builtins.type"),
        (print, "builtins.builtin_function_or_method"),
        ({(Colour.RED, 1): 2}, "Colour"),
        ({Point(1, 2): 2}, "Point"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_torch_would_not_give_back_is_refused_by_name(value: Any, name: str) -> None:
    for holder in (value, [value], {"a": [1, {"b": (value,)}]}, OrderedDict(x=value)):
        with pytest.raises(UnsafeValueError) as caught:
            check_value(holder)
        assert name in str(caught.value).split("cannot be stored")[0]


def test_a_tensor_in_an_opaque_container_is_refused() -> None:
    for value in (OrderedDict(a=torch.ones(1)), [torch.ones(1)], Setting(torch.ones(1))):  # type: ignore[arg-type]
        with pytest.raises(UnsafeValueError, match="tensor"):
            check_value(value)


def test_what_holds_itself_or_is_nested_too_deeply_is_refused() -> None:
    ring: list = []
    ring.append(ring)
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    for value in (ring, deep, {"a": ring}, (deep,)):
        with pytest.raises(UnsafeValueError, match="containers within each other"):
            check_value(value)
        with pytest.raises(UnsafeValueError, match="containers within each other"):
            map_leaves({"a": {"b": [{"c": value}, 1]}}, lambda path, leaf: check_value(leaf))
    while isinstance(deep, list):  # taken apart by hand: a destructor of this depth is a test of its own
        deep = deep.pop()


def test_the_deepest_state_that_is_accepted_can_be_read() -> None:
    value: Any = "bottom"
    for _ in range(MAX_LEVELS):
        value = [value]
    tree: Any = value
    for level in range(MAX_LEVELS - 1):
        tree = {f"level {level}": tree, "weight": TensorRef(level, torch.float32, (2,))}
    check_value(value)
    with pytest.raises(UnsafeValueError):
        check_value([value])
    assert same_tree(as_decoded(tree), decode_tree(encode_tree(tree)))
    assert map_leaves(tree, lambda path, leaf: leaf) == tree


def test_a_class_that_the_user_has_allowed() -> None:
    with pytest.raises(UnsafeValueError, match="Setting"):
        check_value(Setting(0.5))
    with torch.serialization.safe_globals([Setting]):
        check_value({"setting": Setting(0.5)})
        data = encode_tree({"setting": Setting(0.5), "weight": TensorRef(0, torch.float32, (1,))})
        assert decode_tree(data)["setting"].rate == 0.5
    with pytest.raises(ValueError, match="Setting is not on the allow-list"):
        decode_tree(data)


def test_what_torch_allows_itself_when_it_is_distributed_is_no_state() -> None:
    from torch.distributed.tensor import Shard

    assert any("torch.distributed" in str(entry) for entry in torch.serialization.get_safe_globals())
    with pytest.raises(UnsafeValueError, match="Shard"):
        check_value(Shard(0))


def test_a_tensor_takes_no_more_than_200_bytes() -> None:
    refs = [TensorRef(number, torch.float32, (4,)) for number in range(10_000)]
    data = encode_tree({"refs": refs})
    assert len(data) < 200 * len(refs)
    assert len(decode_tree(data)["refs"]) == len(refs)


def test_map_leaves_visits_tensors_and_values_in_order() -> None:
    weight = torch.ones(2)
    tree = {"a": {"w": weight, "n": 3}, "list": [weight, {"x": 1}], "plain": [1, (2,)], "empty": {}, "pair": (weight,)}
    seen: list = []

    def visit(path: tuple, leaf: Any) -> str:
        seen.append((path, leaf))
        return ".".join(map(str, path))

    assert map_leaves(tree, visit) == {
        "a": {"w": "a.w", "n": "a.n"},
        "list": ["list.0", {"x": "list.1.x"}],
        "plain": "plain",
        "empty": "empty",
        "pair": ("pair.0",),
    }
    assert [leaf for path, leaf in seen if path == ("plain",)] == [[1, (2,)]]
    assert map_leaves(OrderedDict(a=1), lambda path, leaf: leaf) == {"a": 1}
    assert math.isclose(map_leaves(2.5, lambda path, leaf: leaf), 2.5)
