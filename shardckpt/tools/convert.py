"""Convert: a checkpoint of any known form, whole or some parts of it, into another form. One process, no group."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from shardckpt.errors import CheckpointLoadError
from shardckpt.tools.moving.folders import find
from shardckpt.tools.moving.seam import TensorSink
from shardckpt.tools.place import Where

BUDGET = 256 << 20
"""Bytes of tensors in memory at once, if nothing is said."""

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
    """What was not converted, and why."""


def convert(
    source: Where,
    target: Where,
    *,
    to: str = "shardckpt",
    step: int | None = None,
    from_step: int | None = None,
    parts: Collection[str] | None = None,
    budget_nbytes: int = BUDGET,
    storage_options: Mapping[str, object] | None = None,
) -> ConvertReport:
    """Read whatever checkpoint lies at `source`, and write it at `target` in the form `to`, by bounded pieces.

    Names, order, dtypes and ties stay as they are; in a file of one model, names stand without "model." in front.
    Nothing in the source is run, nothing outside of it is read. What is written is there whole, or not at all.

    `CheckpointNotFoundError` if there is nothing, `CheckpointDamagedError` for content that is not sound or would run
    code, `CheckpointLoadError` for what cannot be read or is of no known form, `InvalidStateError` for a state that the
    form cannot hold, `CheckpointSaveError` if it cannot be written or is there already, `ValueError` for a bad URL.

    Args:
        source: a file (`*.safetensors`, `*.pt`, `*.bin`, `*.ckpt`), a folder of Hugging Face, Trainer, Lightning,
            fairseq2 or DCP, or a run or step of ours; a path, URL or `Storage`.
        target: the run, folder or file; a path, URL or `Storage`.
        to: "shardckpt", "safetensors", "pt" or "dcp".
        step: the number that it gets; if not given, the one that the source tells, or else 0.
        from_step: which step to read, where there are several; if not given, the last.
        parts: only these of "model", "optimizer", ...; what the others lie in is not read where it can be avoided.
        budget_nbytes: of tensors in memory at once; beside it, up to 64 MiB for those that do not lie row by row.
        storage_options: for fsspec, at both places; never logged.
    """
    make = sink_of(to)
    found = find(source, parts=parts, step=from_step, storage_options=storage_options)
    try:
        number = step if step is not None else found.step or 0
        numbered = {"step": number} if to == "shardckpt" else {}
        sink: TensorSink = make(target, storage_options=storage_options, **numbered)
        sink.write(found.source, budget_nbytes=budget_nbytes)
        tensors = found.source.tensors
        count, nbytes = len(tensors) + len(found.source.ties), sum(facts.nbytes for facts in tensors.values())
        return ConvertReport(found.kind, to, number, count, nbytes, tuple(found.source.tree), found.notes)
    except OSError as error:
        raise CheckpointLoadError(f"the checkpoint could not be converted: {error}") from error
    finally:
        found.source.close()


def sink_of(to: str) -> Any:
    """The class that writes a form; `ValueError` for one that is not known."""
    if to not in SINKS:
        raise ValueError(f"{to!r} is no form that is written: name one of {', '.join(SINKS)}")
    module, name = SINKS[to]
    return getattr(import_module(f"shardckpt.tools.moving.{module}"), name)
