"""Diff: how two checkpoints differ, key by key; of tensors how far apart they are, without either in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from shardckpt.engine.loading.selecting.names import Patterns
from shardckpt.format.index import ITEMSIZE
from shardckpt.run.requests import each
from shardckpt.tools.looking.numbers import Tally
from shardckpt.tools.moving.seam import TensorFacts, TensorName, TensorSource, Window

BUDGET = 128 << 20
"""Bytes in memory at once, about."""
_PER_ELEMENT = 64
"""Bytes of memory that comparing two elements takes, at most: both, as float64, and what is made of these."""
_SHOWN = 60
"""Characters of a value that are told."""

T = TypeVar("T")
Tensors: TypeAlias = Mapping[str, TensorFacts]
Pair: TypeAlias = tuple[str, str]
"""The names of a tensor in both, tied ones by the name of the tensor that they are tied to."""
Stretch: TypeAlias = tuple[Pair, int, int]
"""Of a tensor: the first element, and how many."""
Heard: TypeAlias = Callable[[int, int], None]
"""Hears how many bytes have just been read, of how many that will be, of both together."""


def unheard(nbytes: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """A tensor that both have and that is not alike."""

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    unequal: int | None = None
    """Elements of other value; None where the shapes differ. NaN is equal to NaN."""
    elements: int | None = None
    max_abs: float | None = None
    """The largest absolute difference of two finite elements; None also for dtypes that are no numbers."""
    mean_abs: float | None = None
    not_finite: int = 0
    """Unequal elements of which one is infinite or NaN; they are in neither of these."""


@dataclass(frozen=True, slots=True)
class ValueDiff:
    """A Python value that both have and that is not the same, or a value here and a tensor there; as text."""

    name: str
    texts: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Difference:
    """How two checkpoints differ."""

    only_first: tuple[str, ...]
    """Tensors and values that only one has."""
    only_second: tuple[str, ...]
    tensors: tuple[TensorDiff, ...]
    values: tuple[ValueDiff, ...]
    compared: int
    """Tensors that both have; also those that are alike."""
    compared_values: int
    """The same of Python values."""

    @property
    def is_none(self) -> bool:
        return not (self.only_first or self.only_second or self.tensors or self.values)


def compare(
    first: TensorSource,
    second: TensorSource,
    *,
    only: Sequence[str] = (),
    budget: int = BUDGET,
    told: Heard = unheard,
) -> Difference:
    """Hold one checkpoint against another; `only`: patterns, as in `LoadPolicy(include=...)`.

    Tensors of other dtypes are compared by value, those of other shapes are not. Every tensor that is compared is read
    to its end, so that its checksums are checked: errors as of `TensorSource.read`. `budget`: bytes.
    """
    patterns = Patterns(only)

    def meant(found: Mapping[str, T]) -> dict[str, T]:
        return {name: what for name, what in found.items() if not only or patterns.matching(name)}

    tensors = [meant(_tensors(source)) for source in (first, second)]
    keys = [own | meant(dict(_values(s.tree, ""))) for own, s in zip(tensors, (first, second), strict=True)]
    both = [name for name in tensors[0] if name in tensors[1]]
    return Difference(
        only_first=tuple(name for name in keys[0] if name not in keys[1]),
        only_second=tuple(name for name in keys[1] if name not in keys[0]),
        tensors=tuple(_TensorComparison(first, second, budget, told).run(both, *tensors)),
        values=tuple(_value_diffs(*keys)),
        compared=len(both),
        compared_values=len(keys[0].keys() & keys[1].keys() - tensors[0].keys() - tensors[1].keys()),
    )


class _TensorComparison:
    """All tensors of two sources, in windows that are read together."""

    def __init__(self, first: TensorSource, second: TensorSource, budget: int, told: Heard) -> None:
        self._sources = (first, second)
        self._told = told
        self._most = max(budget // _PER_ELEMENT, 1)

    def run(self, names: Sequence[str], first: Tensors, second: Tensors) -> Iterator[TensorDiff]:
        """The tensors that differ, in order."""
        resolved = {name: (_resolve(self._sources[0], name), _resolve(self._sources[1], name)) for name in names}
        alike = [name for name in names if first[name].shape == second[name].shape]
        tallies: dict[Pair, Tally] = {resolved[name]: Tally() for name in alike}
        dtypes = {resolved[name]: (first[name].dtype, second[name].dtype) for name in alike}
        lengths = {resolved[name]: first[name].nbytes // ITEMSIZE[first[name].dtype] for name in alike}
        total = sum(lengths[pair] * (ITEMSIZE[one] + ITEMSIZE[other]) for pair, (one, other) in dtypes.items())
        for bundle in self._bundles(lengths):
            self._told(self._add(bundle, dtypes, tallies), total)
        for name in names:
            about = (name, (first[name].dtype, second[name].dtype), (first[name].shape, second[name].shape))
            tally = tallies.get(resolved[name])
            if tally is None:
                yield TensorDiff(*about)
            elif tally.unequal or first[name].dtype != second[name].dtype:
                largest, mean = (tally.max_abs, tally.mean_abs) if tally.is_measured else (None, None)
                yield TensorDiff(*about, tally.unequal, tally.elements, largest, mean, tally.not_finite)

    def _bundles(self, lengths: Mapping[Pair, int]) -> Iterator[list[Stretch]]:
        """What is read at once."""
        bundle: list[Stretch] = []
        room = self._most
        for pair, length in lengths.items():
            start = 0
            while start < length:
                count = min(room, length - start)
                bundle.append((pair, start, count))
                start, room = start + count, room - count
                if not room:
                    yield bundle
                    bundle, room = [], self._most
        if bundle:
            yield bundle

    def _add(
        self,
        bundle: Sequence[Stretch],
        dtypes: Mapping[Pair, tuple[str, str]],
        tallies: Mapping[Pair, Tally],
    ) -> int:
        """Gives how many bytes were read."""
        read = each(lambda side: self._read(bundle, dtypes, side), (0, 1))
        for (pair, _, _), one, other in zip(bundle, *read, strict=True):
            tallies[pair].add(one, other, dtypes[pair])
        return sum(len(content) for side in read for content in side)

    def _read(
        self,
        bundle: Sequence[Stretch],
        dtypes: Mapping[Pair, tuple[str, str]],
        side: int,
    ) -> list[bytearray]:
        windows, read = list[Window](), list[bytearray]()
        for pair, start, count in bundle:
            size = ITEMSIZE[dtypes[pair][side]]
            read.append(bytearray(size * count))
            windows.append(Window(pair[side], start * size, memoryview(read[-1])))
        self._sources[side].read(windows)
        return read


def _tensors(source: TensorSource) -> dict[str, TensorFacts]:
    """All of them, tied ones too."""
    return {**source.tensors, **{name: source.tensors[other] for name, other in source.ties.items()}}


def _resolve(source: TensorSource, name: str) -> str:
    return source.ties.get(name, name)


def _values(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The Python values of a tree, by flat name; a list is one value unless there are tensors or dicts in it."""
    if isinstance(node, TensorName):
        return
    items = node.items() if isinstance(node, dict) else enumerate(node) if _is_nesting(node) else ()
    if not items:
        yield name, node
    for key, below in items:
        yield from _values(below, f"{name}.{key}" if name else str(key))


def _is_nesting(node: Any) -> bool:
    if type(node) not in (list, tuple):
        return False
    return any(isinstance(item, (TensorName, dict)) or _is_nesting(item) for item in node)


def _value_diffs(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[ValueDiff]:
    for name, one in first.items():
        if name not in second:
            continue
        other = second[name]
        if isinstance(one, TensorFacts) and isinstance(other, TensorFacts):
            continue
        texts = tuple(_text(value) for value in (one, other))
        if type(one) is not type(other) or not (one == other or repr(one) == repr(other)):
            yield ValueDiff(name, (texts[0], texts[1]))


def _text(value: Any) -> str:
    if isinstance(value, TensorFacts):
        return f"a tensor, {value.dtype} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
