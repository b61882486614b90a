"""Convert: a checkpoint of any known form, whole or some parts of it, into another form. One process, no group."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from shardckpt.errors import CheckpointLoadError
from shardckpt.tools.exporting.summing import unsummed
from shardckpt.tools.moving.folders import find
from shardckpt.tools.moving.seam import TensorSink, TensorSource
from shardckpt.tools.moving.writing.told import Means, ToldSource
from shardckpt.tools.place import Where
from shardckpt.tools.report import ADDED

_SUMMED = ("pt", "shardckpt")
"""The forms in which sums stand before the data, so that tensors whose sums nobody knows are read twice."""

SINKS: dict[str, tuple[str, str]] = {
    "shardckpt": ("step_sink", "StepSink"),
    "safetensors": ("safetensors_sink", "SafetensorsSink"),
    "pt": ("archive_sink", "ArchiveSink"),
    "dcp": ("dcp_sink", "DcpSink"),
}
"""Name of a form -> the module of `shardckpt.tools.moving`, and the class in it, that writes it.

The class is made as `Sink(where, storage_options=...)`, and with `step=...` that of our own form.
"""


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was converted."""

    kind: str
    """What lay at the place that it came from, in words."""
    to: str
    step: int
    tensors: int
    """Tied ones too."""
    nbytes: int
    """Of the tensors, tied ones once."""
    parts: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What was not converted, and why; what was added."""


def convert(
    source: Where,
    target: Where,
    *,
    to: str = "shardckpt",
    step: int | None = None,
    from_step: int | None = None,
    parts: Collection[str] | None = None,
    add: Mapping[str, Any] | None = None,
    means: Means | None = None,
) -> ConvertReport:
    """Read whatever checkpoint lies at `source`, and write it at `target` in the form `to`, by bounded pieces.

    Names, order, dtypes and ties stay as they are; in a file of one model, names stand without "model." in front.
    Nothing in the source is run, nothing outside of it is read. What is written is there whole, or not at all.

    `CheckpointNotFoundError` if there is nothing, `CheckpointDamagedError` for content that is not sound or would run
    code, `CheckpointLoadError` for what cannot be read or is of no known form, `InvalidStateError` for a state that the
    form cannot hold, `CheckpointSaveError` if it cannot be written or is there already, `ValueError` for a bad URL.

    Args:
        source: a file (`*.safetensors`, `*.pt`, `*.bin`, `*.ckpt`), a folder of Hugging Face, Trainer, Lightning,
            fairseq2, torch_checkpointing or DCP, or a run or step of ours; a path, URL or `Storage`. Files of several
            ranks are joined as their DTensors say; what each rank had of its own comes as `rng_0`, `rng_1`, ...
        target: the run, folder or file; a path, URL or `Storage`.
        to: "shardckpt", "safetensors", "pt" or "dcp".
        step: the number that it gets; if not given, the one that the source tells, or else 0.
        from_step: which step to read, where there are several; if not given, the last.
        parts: only these of "model", "optimizer", ...; what the others lie in is not read where it can be avoided.
        add: parts that are not in it, by name: another checkpoint that has such a part, or a state, or an object with
            `state_dict`, such as `RngState()`. So a checkpoint becomes one that a job can go on from; the new step
            says in its metadata what was added.
        means: memory, storage options, who hears of progress.
    """
    make, means = sink_of(to), means or Means()
    means.check_alone("convert")
    options = means.storage_options
    found = find(source, parts=parts, step=from_step, storage_options=options)
    whole: TensorSource = found.source
    try:
        number, told = step if step is not None else found.step or 0, dict[str, str]()
        if add:
            from shardckpt.tools.moving.writing.completed import completed

            whole, told = completed(found.source, add, storage_options=options)
        nbytes, total = sum(facts.nbytes for facts in whole.tensors.values()), nbytes_read(whole, to)
        metadata = {"metadata": {ADDED: told}} if told else {}
        numbered: dict[str, Any] = {"step": number, **metadata} if to == "shardckpt" else {}
        sink: TensorSink = make(target, storage_options=options, **numbered)
        heard = ToldSource(whole, lambda count: means.told(number, count, total))
        sink.write(heard, budget_nbytes=means.budget_nbytes)
        count = len(whole.tensors) + len(whole.ties)
        notes = (*found.notes, *(f"{part} was added, from {origin}" for part, origin in told.items()))
        return ConvertReport(found.kind, to, number, count, nbytes, tuple(whole.tree), notes)
    except OSError as error:
        raise CheckpointLoadError(f"the checkpoint could not be converted: {error}") from error
    finally:
        whole.close()
        if whole is not found.source:
            found.source.close()


def nbytes_read(source: TensorSource, to: str) -> int:
    """Bytes that will be read to write it in that form."""
    twice = unsummed(source, source.tensors) if to in _SUMMED else {}
    return sum(facts.nbytes for facts in (*source.tensors.values(), *twice.values()))


def sink_of(to: str) -> Any:
    """The class that writes a form; `ValueError` for one that is not known."""
    if to not in SINKS:
        raise ValueError(f"{to!r} is no form that is written: name one of {', '.join(SINKS)}")
    module, name = SINKS[to]
    return getattr(import_module(f"shardckpt.tools.moving.{module}"), name)
