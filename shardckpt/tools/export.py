"""Export: a committed step as files that need no shardckpt, from any mesh. One process, no group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, TypeAlias

from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.checksum import crc32
from shardckpt.format.layout import CARBON_COPY
from shardckpt.tools.convert import PASSES, sink_of
from shardckpt.tools.moving.seam import TensorSink, TensorSource
from shardckpt.tools.moving.step import StepSource
from shardckpt.tools.moving.writing.cast import CastSource
from shardckpt.tools.moving.writing.outlet import names_file
from shardckpt.tools.moving.writing.told import Means, ToldSource
from shardckpt.tools.place import Where

Form: TypeAlias = Literal["safetensors", "pt"]
FORMS: tuple[Form, ...] = ("safetensors", "pt")

BESIDE = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.tiktoken", "spiece.model", "sentencepiece*", "chat_template*"),
    *("preprocessor_config.json", "processor_config.json", "adapter_config.json"),
)
"""What `from_pretrained` looks for beside a model."""
_LARGE = 256 << 20


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was exported."""

    source: str
    """The step, without credentials."""
    step: int
    form: str
    tensors: int
    """Tied ones too."""
    nbytes: int
    """Of the tensors as they were written, tied ones once."""
    copied: tuple[str, ...] = ()
    """Files of the step that were copied beside them."""
    notes: tuple[str, ...] = ()
    """What somebody should know of it."""


def export(
    url: Where,
    to: Where,
    *,
    step: int | None = None,
    form: Form = "safetensors",
    dtype: str | None = None,
    max_file_nbytes: int | None = None,
    part: str = "model",
    means: Means | None = None,
) -> ExportReport:
    """Write the model of a committed step as consolidated safetensors or as one `.pt` file, by bounded pieces.

    It does not matter on which ranks it was saved, or where it lies. Into a folder go also `config.json` and the files
    of a tokenizer that the step has as copies of `cc/`. What is written is there whole, or not at all; nothing that
    is there is ever replaced.

    `CheckpointNotFoundError` if there is no such step or part, `CheckpointDamagedError` if its bytes are not those that
    were saved, `CheckpointLoadError` if it cannot be read, `InvalidStateError` for what the form cannot hold,
    `CheckpointSaveError` if it is there already or cannot be written, `ValueError` for bad arguments.

    Args:
        url: a run or a step; a path, URL or `Storage`.
        to: a folder that is not there yet, or a file (`*.safetensors`; `*.pt`, `*.bin`).
        step: which of the run; if not given, the newest.
        form: "safetensors", as `save_pretrained` makes it, or "pt", one archive.
        dtype: floating-point tensors are rounded to this ("bfloat16"); if not given, nothing is.
        max_file_nbytes: of tensors in one safetensors file; 5 GB if not given.
        part: the key of the state that is exported; it is taken off the names if it is the model, and in safetensors.
        means: memory, storage options, who hears of progress.
    """
    means = means or Means()
    options = options_of(form, max_file_nbytes)
    opened = StepSource.open(
        url, step=step, part=part, budget_nbytes=means.budget_nbytes // 4, storage_options=means.storage_options
    )
    with opened as own:
        require(own, part)
        kind = sink_of(form)
        others = {} if names_file(to, kind.ENDINGS) else dict(beside(own))
        make = partial(kind, to, storage_options=means.storage_options, **options)
        return written(own, own, make, form=form, dtype=dtype, others=others, means=means)


def require(source: StepSource, part: str) -> None:
    """`CheckpointNotFoundError` if a step that was opened for this part has nothing of it."""
    if not (source.tensors or source.ties or source.tree):
        step, has = source.manifest.step, ", ".join(source.manifest.parts) or "nothing that is known"
        raise CheckpointNotFoundError(f"step {step} at {source.url} has no {part!r}, but {has}", step=step)


def written(
    own: StepSource,
    source: TensorSource,
    make: Callable[..., TensorSink],
    *,
    form: Form,
    dtype: str | None,
    others: Mapping[str, bytes],
    means: Means,
) -> ExportReport:
    """Write a source that was made of a step, in this dtype, to the sink that `make` makes, `others` beside it."""
    number = own.manifest.step
    count = len(source.tensors) + len(source.ties)
    source = CastSource(source, dtype) if dtype is not None else source
    nbytes = sum(facts.nbytes for facts in source.tensors.values())
    total = nbytes * PASSES[form]
    told = ToldSource(source, lambda read: means.told(number, read, total))
    make(beside=others).write(told, budget_nbytes=means.budget_nbytes // (1 if dtype is None else 2))
    return ExportReport(own.url, number, form, count, nbytes, tuple(others), _notes(own))


def options_of(form: str, max_file_nbytes: int | None = None) -> dict[str, int]:
    """For the sink of a form; `ValueError` for what is none, or not of this one."""
    if form not in FORMS:
        raise ValueError(f"{form!r} is no form of an export: name one of {', '.join(FORMS)}")
    if max_file_nbytes is None:
        return {}
    if form != "safetensors":
        raise ValueError("max_file_nbytes is for safetensors; a .pt file is one")
    return {"max_file_nbytes": max_file_nbytes}


def beside(source: StepSource) -> Iterator[tuple[str, bytes]]:
    """The copies of `cc/` that belong to a model, as they are in the record."""
    for file in source.manifest.files:
        if file.kind != CARBON_COPY or not any(fnmatchcase(file.name, pattern) for pattern in BESIDE):
            continue
        if "/" in file.name or file.nbytes > _LARGE:
            continue
        try:
            content = source.storage.read(f"{source.folder}/{file.name}")
        except OSError as error:
            raise CheckpointLoadError(f"{file.name} of {source.url} cannot be read: {error}") from error
        if len(content) != file.nbytes or crc32(content) != file.crc:
            raise CheckpointDamagedError(
                f"{file.name} of {source.url} is not what was saved", step=source.manifest.step
            )
        yield file.name, content


def _notes(source: StepSource) -> tuple[str, ...]:
    if not source.differ:
        return ()
    more = ", ..." if source.differ[3:] else ""
    return (
        f"ranks held different ones of {', '.join(source.differ[:3])}{more}; those of rank {source.rank} were taken",
    )
