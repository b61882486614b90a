"""A model with a LoRA adapter as a source of the model that it is together with it, window by window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from shardckpt.errors import InvalidStateError
from shardckpt.tools.merging.config import LoraConfig
from shardckpt.tools.merging.names import Named, Pair, sort_names
from shardckpt.tools.moving.foreign.nesting import Path, flat_name, walk
from shardckpt.tools.moving.seam import TensorFacts, TensorName, TensorSource, Window
from shardckpt.tools.moving.writing.elements import Stretch

_HALF = (torch.float16, torch.bfloat16)
_ROWS = 64
"""Of A and B that are multiplied at once, at least."""
_WEIGHTS = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class _Update:
    """What is added to a weight: `scale * B @ A`, rows for output features, or that transposed."""

    a: str
    b: str
    scale: float
    transposed: bool = False
    rounded: bool = False
    """To the dtype of the weight, before it is added: embeddings."""


class _Read(NamedTuple):
    stretch: Stretch
    elements: torch.Tensor
    """Of the base, as they were read."""


@dataclass(frozen=True, slots=True)
class _Factors:
    """A and B in memory."""

    update: _Update
    a: torch.Tensor | None
    """None if it is the bias of B that is added."""
    b: torch.Tensor

    def added(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """The elements from `first` to `last` of what is added to a weight of this dtype."""
        update, a, b = self.update, self.a, self.b
        if a is None:
            return (b * update.scale)[first:last]
        if b.dtype in _HALF:  # as PEFT does on a CPU
            a, b = a.float(), b.float()
        count, columns = (a.shape[1], b.shape[0]) if update.transposed else (b.shape[0], a.shape[1])
        top, end = _block(first // columns, -(-last // columns), count)
        rows = (b @ a[:, top:end]).T if update.transposed else b[top:end] @ a
        rows = (rows * update.scale).to(self.b.dtype)
        if update.rounded:
            rows = rows.to(dtype)
        return rows.reshape(-1)[first - top * columns : last - top * columns]


class MergedSource:
    """`W + scale * B @ A` for each weight that the adapter changes, under the names that the base model has; a module
    that was trained as a whole (`modules_to_save`) takes the place of its original.

    Calculated as PEFT's `merge_and_unload` does it on a CPU, in the dtype of the adapter (float32 for float16 and
    bfloat16), and rounded to the dtype of the base. A weight that is read in parts is multiplied in parts, of 64 rows
    at least: on one thread that came out bit for bit the same in all of 1,800 tries, on two in all but 5 (2026-11,
    MKL, AMD EPYC). A and B are read whole for each part.
    """

    def __init__(self, source: TensorSource, config: LoraConfig, *, part: str, adapter: str | None = None) -> None:
        """`part`: the key of the model in the state. Closes no source. `InvalidStateError` for what is no such model,
        lists what does not fit, and as `sort_names`."""
        self._source, self._config, self._part = source, config, part
        self._leaves = dict[str, Any]()
        walk(source.tree[part], TensorName, self._take)
        self.named: Named = sort_names(self._leaves, adapter=adapter)
        self._facts, self._ties, self._read_as = dict[str, TensorFacts](), dict[str, str](), dict[str, str]()
        self._place()
        self._updates = {f"{part}.{name}": self._of_bias(pair) for name, pair in self.named.biases.items()}
        self._updates |= self._of_weights()

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return self._facts

    @property
    def ties(self) -> Mapping[str, str]:
        return self._ties

    @property
    def tree(self) -> Any:
        below = {}
        for name, was in self.named.kept.items():
            leaf = self._leaves[was]
            below[name] = TensorName(f"{self._part}.{name}") if isinstance(leaf, TensorName) else leaf
        return {self._part: below}

    def read(self, windows: Sequence[Window]) -> None:
        asked, made = list[Window](), dict[str, list[_Read]]()
        for window in windows:
            own = self._read_as[window.name]
            if window.name not in self._updates:
                asked.append(Window(own, window.start, window.into))
                continue
            stretch = Stretch.of(window, self._facts[window.name])
            elements, view, start = stretch.space(stretch.facts.dtype)
            asked.append(Window(own, start, view))
            made.setdefault(window.name, []).append(_Read(stretch, elements))
        self._source.read(asked)
        for name, reads in made.items():
            factors = self._factors(self._updates[name])
            for run in _runs(reads):
                first, last = run[0].stretch.first, max(read.stretch.last for read in run)
                added = factors.added(first, last, run[0].elements.dtype)
                for stretch, elements in run:
                    elements += added[stretch.first - first : stretch.last - first]
                    stretch.fill(elements)

    def close(self) -> None:
        """Nothing: the source is the caller's."""

    def _take(self, path: Path, leaf: Any) -> Any:
        self._leaves[flat_name(path)] = leaf
        return leaf

    def _own(self, name: str) -> str:
        """What the source calls the bytes of a tensor of the model."""
        leaf = self._leaves[name]
        return self._source.ties.get(leaf.name, leaf.name)

    def _place(self) -> None:
        """Which tensor is which of the source; the first of tied ones has the bytes."""
        first = dict[str, str]()
        for name, was in self.named.kept.items():
            if not isinstance(self._leaves[was], TensorName):
                continue
            new, own = f"{self._part}.{name}", self._own(was)
            if first.setdefault(own, new) != new:
                self._ties[new] = first[own]
                continue
            self._facts[new], self._read_as[new] = self._source.tensors[own], own
        shared = {*self._ties, *self._ties.values()}
        torn = [name for name in (*self.named.weights, *self.named.biases) if f"{self._part}.{name}" in shared]
        if torn:
            raise InvalidStateError(
                f"{', '.join(torn)}: tied to another tensor, which the adapter does not change, so that they cannot be "
                "one any more; untie them in the program, and save again"
            )

    def _of_bias(self, pair: Pair) -> _Update:
        return _Update("", pair.bias, self._config.scale_of(pair.module))

    def _of_weights(self) -> dict[str, _Update]:
        """`InvalidStateError` that lists all that do not fit."""
        updates, problems, square, seen = dict[str, _Update](), list[str](), list[str](), set[bool]()
        for name, pair in self.named.weights.items():
            full = f"{self._part}.{name}"
            weight = self._facts[full]
            a, b = (_matrix(self._source.tensors[self._own(each)]) for each in (pair.a, pair.b))
            rank, shape = self._config.rank_of(pair.module), _matrix(weight)
            plain, turned = shape == (b[0], a[1]), shape == (a[1], b[0]) and len(weight.shape) == 2
            if a[0] != rank or b[1] != rank:
                problems.append(f"{pair.module} has an adapter of rank {a[0]}, and the configuration says {rank}")
            elif weight.dtype not in _WEIGHTS:
                problems.append(f"{name} is {weight.dtype}, which nothing can be added to")
            elif not (turned if pair.is_embedding else plain or turned):
                problems.append(f"{name} is {list(weight.shape)}, and B @ A is {[b[0], a[1]]}")
            elif plain and turned and not pair.is_embedding:
                square.append(name)
            elif not pair.is_embedding:
                seen.add(turned)
            transposed = pair.is_embedding or (self._config.fan_in_fan_out if plain and turned else turned)
            scale = self._config.scale_of(pair.module)
            updates[full] = _Update(pair.a, pair.b, scale, transposed=transposed, rounded=pair.is_embedding)
        if square and seen and self._config.fan_in_fan_out not in seen:
            problems.append(f"{square[0]} is square: fan_in_fan_out must say which way, and is not so of the others")
        if problems:
            raise InvalidStateError(f"this adapter cannot be merged: {'; '.join(problems)}")
        return updates

    def _factors(self, update: _Update) -> _Factors:
        b = self._whole(update.b)
        return _Factors(update, self._whole(update.a) if update.a else None, b)

    def _whole(self, name: str) -> torch.Tensor:
        """A or B, as a matrix; the bias of B as it is."""
        own = self._own(name)
        facts = self._source.tensors[own]
        flat = torch.empty(math.prod(facts.shape), dtype=getattr(torch, facts.dtype))
        self._source.read([Window(own, 0, memoryview(flat.view(torch.uint8).numpy().data))])
        return flat.view(facts.shape[0], -1) if facts.shape[1:] else flat


def _matrix(facts: TensorFacts) -> tuple[int, int]:
    """Rows and columns; of a convolution, all but the first dimension is columns."""
    return (facts.shape[0] if facts.shape else 1), math.prod(facts.shape[1:])


def _block(top: int, end: int, count: int) -> tuple[int, int]:
    """Rows from `top` to `end`, of so many, and some around them: a product of a few rows is rounded otherwise than
    the same rows of a product of many."""
    top, end = top - top % _ROWS, min(-(-end // _ROWS) * _ROWS, count)
    return (max(top - _ROWS, 0) if end - top < _ROWS else top), end


def _runs(reads: list[_Read]) -> list[list[_Read]]:
    """Those that follow upon each other, together: what they need is multiplied at once."""
    runs = list[list[_Read]]()
    for read in sorted(reads, key=lambda each: each.stretch.first):
        if runs and read.stretch.first <= max(each.stretch.last for each in runs[-1]):
            runs[-1].append(read)
        else:
            runs.append([read])
    return runs
