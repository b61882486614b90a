"""Average: the models of several checkpoints as one, tensor by tensor. One process, no group."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.storage.objects.secrecy import redact
from shardckpt.tools.convert import nbytes_read, sink_of
from shardckpt.tools.moving.folders import find
from shardckpt.tools.moving.seam import TensorSink, TensorSource
from shardckpt.tools.moving.step import StepSource
from shardckpt.tools.moving.writing.averaged import AveragedSource, Integers, rates_of
from shardckpt.tools.moving.writing.told import Means, ToldSource
from shardckpt.tools.place import Where

AverageForm: TypeAlias = Literal["shardckpt", "safetensors", "pt"]
FORMS: tuple[AverageForm, ...] = ("shardckpt", "safetensors", "pt")
_PART = "model"


@dataclass(frozen=True, slots=True)
class AverageReport:
    """What was averaged."""

    sources: tuple[str, ...]
    """The steps, in the order in which they were taken, without credentials."""
    weights: tuple[float, ...]
    """The share of each in the result; together 1."""
    form: str
    step: int
    """The number that the result has as a step; else that of the last source."""
    tensors: int
    """Tied ones too."""
    nbytes: int
    """Of the tensors, tied ones once."""


def average(
    sources: Sequence[Where | tuple[Where, int]],
    to: Where,
    *,
    weights: Sequence[float] | None = None,
    decay: float | None = None,
    integers: Integers = "equal",
    form: AverageForm = "shardckpt",
    step: int | None = None,
    means: Means | None = None,
) -> AverageReport:
    """Average the models of committed steps, of any meshes, into a step that is new or into files.

    It is calculated in float32, for float64 in float64, and rounded once: dtypes stay as they are, and what is alike in
    all steps stays bit for bit what it is. Values that are no tensors are the last step's. The result is there whole,
    or not at all.

    `CheckpointMismatchError` if the models do not have the same tensors (its `problems` lists every difference),
    `InvalidStateError` if tensors that are no real or complex numbers differ; else as `export`.

    Args:
        sources: runs, of which the newest step is meant, or steps, or checkpoints of any form that `convert` reads;
            each a path, URL or `Storage`, or that of a run with the number of a step.
        to: the run, folder or file to write.
        weights: one for each; they need not add up to 1. If not given, all count alike.
        decay: instead, an exponential moving average in the given order, `mean = decay * mean + (1 - decay) * value`.
        integers: tensors of integers and truth values must be "equal", or are those of the "last".
        form: "shardckpt", a step; or "safetensors" or "pt", as `export` writes them.
        step: the number that the result gets as a step; if not given, that of the last source.
        means: memory, storage options, who hears of progress.
    """
    means = means or Means()
    means.check_alone("average")
    if not sources:
        raise ValueError("there is nothing to be averaged")
    if form not in FORMS:
        raise ValueError(f"{form!r} is no form of an average: name one of {', '.join(FORMS)}")
    if integers not in ("equal", "last"):
        raise ValueError(f'integers are "equal" or "last", not {integers!r}')
    rates = rates_of(len(sources), weights=weights, decay=decay)
    with ExitStack() as stack:
        models = [_opened(stack, source, means, len(sources)) for source in sources]
        number = models[-1].step if step is None else step
        mean = AveragedSource([model.source for model in models], rates, integers=integers)
        nbytes = sum(facts.nbytes for facts in mean.tensors.values())
        total = nbytes_read(mean, form)
        told = ToldSource(mean, lambda count: means.told(number, count, total))
        numbered: dict[str, Any] = {"step": number} if form == "shardckpt" else {}
        sink: TensorSink = sink_of(form)(to, storage_options=means.storage_options, **numbered)
        sink.write(told, budget_nbytes=means.budget_nbytes // _WIDER)
        urls = tuple(model.url for model in models)
        return AverageReport(urls, _shares(rates), form, number, len(mean.tensors) + len(mean.ties), nbytes)


_WIDER = 4
"""What is read at once needs memory as it is, in float32, and as the mean."""


@dataclass(frozen=True, slots=True)
class _Model:
    source: TensorSource
    url: str
    step: int


def _opened(stack: ExitStack, source: Where | tuple[Where, int], means: Means, count: int) -> _Model:
    """The model of a committed step, or of a checkpoint of another program."""
    where, step = source if isinstance(source, tuple) else (source, None)
    budget, options = max(means.budget_nbytes // 4 // count, 1 << 20), means.storage_options
    try:
        own = StepSource.open(where, step=step, part=_PART, budget_nbytes=budget, storage_options=options)
    except CheckpointNotFoundError as missing:
        return _foreign(stack, where, step, options, missing)
    stack.callback(own.close)
    if not own.tensors:
        raise CheckpointNotFoundError(f"step {own.manifest.step} at {own.url} has no {_PART!r}")
    return _Model(own, own.url, own.manifest.step)


def _foreign(
    stack: ExitStack, where: Where, step: int | None, options: Mapping[str, object] | None, missing: Exception
) -> _Model:
    try:
        found = find(where, parts=[_PART], step=step, storage_options=options)
    except CheckpointNotFoundError:
        raise missing from None
    except CheckpointDamagedError:
        raise
    except CheckpointLoadError as error:  # nothing that has a model
        raise CheckpointNotFoundError(str(error)) from error
    stack.callback(found.source.close)
    url = redact(os.fspath(where)) if isinstance(where, (str, os.PathLike)) else where.url
    return _Model(found.source, url, found.step or 0)


def _shares(rates: Sequence[float]) -> tuple[float, ...]:
    shares = list[float]()
    for rate in rates:
        shares = [*(share * (1 - rate) for share in shares), rate]
    return tuple(shares)
