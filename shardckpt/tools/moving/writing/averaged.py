"""A source that is the average of others, tensor by tensor, window by window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch

from shardckpt.errors import CheckpointMismatchError, InvalidStateError
from shardckpt.tools.moving.seam import TensorFacts, TensorSource, Window
from shardckpt.tools.moving.writing.cast import floating
from shardckpt.tools.moving.writing.elements import Stretch

Integers: TypeAlias = Literal["equal", "last"]
_COMPARED = 1 << 20
"""Bytes of each source that are compared at once."""
_SHOWN = 20


class AveragedSource:
    """The running mean of sources: after each, `mean += rate * (value - mean)`, where the rate of the first is 1.

    So a mean, a weighted mean and an exponential moving average differ in their rates only, and what all sources hold
    alike comes out bit for bit, infinities too. It is calculated in float32, for float64 in float64 (complex likewise),
    and rounded once, to the dtype that the tensors have. All other tensors must be equal, or are the last one's; so are
    values that are no tensors. A name is tied if it is tied in all of them.
    """

    def __init__(
        self, sources: Sequence[TensorSource], rates: Sequence[float], *, integers: Integers = "equal"
    ) -> None:
        """`rates`: as many as sources. Closes no source.

        `CheckpointMismatchError` if they do not have the same tensors of the same shape and dtype: all differences are
        in its `problems`. `InvalidStateError` that names the tensors that are not equal and would have to be.
        """
        assert len(rates) == len(sources) > 0
        self._sources, self._rates = list(sources), list(rates)
        known = [_all(source) for source in sources]
        if problems := _differences(known):
            more = f"; and {len(problems) - _SHOWN} more" if problems[_SHOWN:] else ""
            text = "; ".join(problems[:_SHOWN])
            raise CheckpointMismatchError(f"these checkpoints cannot be averaged: {text}{more}", problems=problems)
        ties = [source.ties for source in sources]
        self._ties = {name: of for name, of in ties[0].items() if all(other.get(name) == of for other in ties)}
        self._facts = {name: facts for name, facts in known[0].items() if name not in self._ties}
        if integers == "equal" and (unequal := [name for name in self._facts if not self._is_equal(name)]):
            raise InvalidStateError(
                f"{', '.join(unequal[:_SHOWN])}{', ...' if unequal[_SHOWN:] else ''}: no numbers that can be averaged, "
                'and not the same in all; say integers="last" to have those of the last'
            )

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return self._facts

    @property
    def ties(self) -> Mapping[str, str]:
        return self._ties

    @property
    def tree(self) -> Any:
        return self._sources[-1].tree

    def read(self, windows: Sequence[Window]) -> None:
        last = self._sources[-1]
        last.read([_of(last, window) for window in windows if not _is_averaged(self._facts[window.name])])
        stretches = [
            Stretch.of(window, self._facts[window.name]) for window in windows if _is_averaged(self._facts[window.name])
        ]
        means: list[torch.Tensor] = []
        for source, rate in zip(self._sources, self._rates, strict=True):
            spaces = [stretch.space(stretch.facts.dtype) for stretch in stretches]
            source.read(
                [
                    _of(source, Window(stretch.window.name, start, view))
                    for stretch, (_, view, start) in zip(stretches, spaces, strict=True)
                ]
            )
            values = [_wide(elements) for elements, _, _ in spaces]
            if not means:
                means = values
                continue
            for mean, value in zip(means, values, strict=True):
                _approach(mean, value, rate)
        for stretch, mean in zip(stretches, means, strict=True):
            stretch.fill(mean.to(getattr(torch, stretch.facts.dtype)))

    def close(self) -> None:
        """Nothing: the sources are the caller's."""

    def _is_equal(self, name: str) -> bool:
        facts = self._facts[name]
        if _is_averaged(facts):
            return True
        first, other = bytearray(_COMPARED), bytearray(_COMPARED)
        for start in range(0, facts.nbytes, _COMPARED):
            count = min(_COMPARED, facts.nbytes - start)
            self._sources[0].read([_of(self._sources[0], Window(name, start, memoryview(first)[:count]))])
            for source in self._sources[1:]:
                source.read([_of(source, Window(name, start, memoryview(other)[:count]))])
                if first[:count] != other[:count]:
                    return False
        return True


def rates_of(count: int, *, weights: Sequence[float] | None, decay: float | None) -> list[float]:
    """The rates for the mean; for these weights; or for a moving average, `mean = decay * mean + (1 - decay) * value`.

    `ValueError` for weights that are negative, all zero, or not as many, a decay that is not in [0, 1), or both.
    """
    if weights is not None and decay is not None:
        raise ValueError("give weights or a decay, not both")
    if decay is not None:
        if not 0 <= decay < 1:
            raise ValueError(f"a decay of {decay} averages nothing: give one from 0 to less than 1")
        return [1.0, *[1 - decay] * (count - 1)]
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} checkpoints: give one for each")
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise ValueError(f"weights must not be negative or endless, nor all zero: {weights}")
    totals = [sum(weights[: number + 1]) for number in range(count)]
    return [weight / total if total else 1.0 for weight, total in zip(weights, totals, strict=True)]


def _is_averaged(facts: TensorFacts) -> bool:
    return floating(facts.dtype) or facts.dtype.startswith("complex")


def _wide(elements: torch.Tensor) -> torch.Tensor:
    if elements.is_complex():
        return elements.to(torch.promote_types(elements.dtype, torch.complex64))
    return elements if elements.dtype == torch.float64 else elements.to(torch.float32)


def _approach(mean: torch.Tensor, value: torch.Tensor, rate: float) -> None:
    """In place. A rate of 1 forgets the mean; equal elements stay as they are, for inf - inf is no number."""
    if rate == 1:
        mean.copy_(value)
    elif rate:
        moved = torch.add(mean, value.sub(mean), alpha=rate)
        torch.where(value == mean, mean, moved, out=mean)


def _all(source: TensorSource) -> dict[str, TensorFacts]:
    """Tied ones too, in the order of the tree as far as the source keeps it."""
    facts = dict(source.tensors)
    return facts | {name: facts[of] for name, of in source.ties.items()}


def _of(source: TensorSource, window: Window) -> Window:
    return Window(source.ties.get(window.name, window.name), window.start, window.into)


def _differences(known: Sequence[Mapping[str, TensorFacts]]) -> list[str]:
    """Against the first, in words."""
    problems, first = dict[str, None](), known[0]
    for number, facts in enumerate(known[1:], 2):
        problems |= dict.fromkeys(f"{name} is not in number {number}" for name in first if name not in facts)
        problems |= dict.fromkeys(
            f"{name} is in number {number}, not in the first" for name in facts if name not in first
        )
        for name, own in first.items():
            if name in facts and facts[name] != own:
                other = facts[name]
                text = f"{own.dtype}{list(own.shape)} in the first, {other.dtype}{list(other.shape)} in number {number}"
                problems[f"{name} is {text}"] = None
    return list(problems)
