"""Export: a committed step as files that need no shardckpt, from any mesh. By one process, or by all ranks of a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from shardckpt.errors import CheckpointDamagedError, CheckpointLoadError, CheckpointNotFoundError
from shardckpt.format.checksum import crc32
from shardckpt.format.layout import CARBON_COPY
from shardckpt.manager.talk import Talk
from shardckpt.storage.base import RenamingStorage
from shardckpt.tools.convert import nbytes_read, sink_of
from shardckpt.tools.exporting.jointly import write_jointly
from shardckpt.tools.exporting.sink import FileSink
from shardckpt.tools.moving.seam import TensorSource
from shardckpt.tools.moving.step import StepSource
from shardckpt.tools.moving.writing.cast import CastSource, check_floating
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
_FROM_FILES = 64 << 20
"""Bytes of a budget that are of use where the step lies on a file system: more is memory that is touched for the first
time, which takes longer than to read. (0.27 GB, system time: 0.11 s with 64 MiB, 0.18 s with 256 MiB; 2026-11.)"""


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
        means: memory, storage options, who hears of progress; and `gangs`, with which all ranks of a job call this, in
            the same order as other forks of these gangs, and each writes a stretch of the files; training may go on
            meanwhile if it is called in a thread of its own, with `gangs.fork("export")` made on the main thread. Its
            errors are then the same on all ranks; beside those above `GangError` if one did not come, and
            `RootNotSharedError` if `to` is not one place for all of them.
    """
    means = means or Means()
    wish = Wish(to, form, dtype, options_of(form, max_file_nbytes), part, means)
    if dtype is not None:
        check_floating(dtype)
    if means.gangs is None or means.gangs.root.size == 1:
        with opened(url, step, wish) as own:
            return written(own, wish, dict(beside(own)))
    with closing(Talk(means.gangs.fork("export").root, timeout=means.timeout)) as talk:
        talk.enter("export")
        return _export_jointly(talk, url, step, wish)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be written, where, and by what means."""

    to: Where
    form: Form
    dtype: str | None
    options: Mapping[str, int]
    part: str
    means: Means


def _export_jointly(talk: Talk, url: Where, step: int | None, wish: Wish) -> ExportReport:
    """On all ranks, in a conversation. What rank 0 finds is what all export."""
    with ExitStack() as stack:
        found: list[StepSource] = []
        others: dict[str, bytes] = {}

        def find() -> Any:
            found.append(stack.enter_context(opened(url, step, wish)))
            others.update(beside(found[0]))
            return [found[0].manifest.step, found[0].manifest.attempt, list(others)]

        number, attempt, names = talk.from_rank_0(find, "find the step")

        def open_it() -> None:
            if not found:
                found.append(stack.enter_context(opened(url, number, wish)))
            if found[0].manifest.attempt != attempt:
                raise CheckpointLoadError(f"step {number} at {found[0].url} is replaced while it is exported")

        talk.gather(open_it, "open the step", step=number)
        return written(found[0], wish, others or dict.fromkeys(names, b""), talk)


def opened(url: Where, step: int | None, wish: Wish) -> StepSource:
    """`CheckpointNotFoundError` if there is no such step, or nothing of that part in it."""
    means = wish.means
    own = StepSource.open(
        url,
        step=step,
        part=wish.part,
        budget_nbytes=means.budget_nbytes // 4,
        storage_options=means.storage_options,
    )
    if not (own.tensors or own.ties or own.tree):
        own.close()
        number, has = own.manifest.step, ", ".join(own.manifest.parts) or "nothing that is known"
        raise CheckpointNotFoundError(f"step {number} at {own.url} has no {wish.part!r}, but {has}", step=number)
    return own


def written(
    own: StepSource,
    wish: Wish,
    others: Mapping[str, bytes],
    talk: Talk | None = None,
    *,
    made: TensorSource | None = None,
) -> ExportReport:
    """Write a step, or what was `made` of it. `others`: what goes beside it, if it is a folder; contents on rank 0."""
    means, number, kind = wish.means, own.manifest.step, sink_of(wish.form)
    others = {} if names_file(wish.to, kind.ENDINGS) else others
    source: TensorSource = own if made is None else made
    count = len(source.tensors) + len(source.ties)
    source = CastSource(source, wish.dtype) if wish.dtype is not None else source
    nbytes = sum(facts.nbytes for facts in source.tensors.values())
    total = nbytes_read(source, wish.form) // (talk.gang.size if talk is not None else 1)
    source = ToldSource(source, lambda count: means.told(number, count, total))
    sink: FileSink = kind(wish.to, beside=others, storage_options=means.storage_options, **wish.options)
    at_once = min(means.budget_nbytes, _FROM_FILES) if isinstance(own.storage, RenamingStorage) else means.budget_nbytes
    budget = at_once // (1 if wish.dtype is None else 2)
    if talk is None:
        sink.write(source, budget_nbytes=budget)
    else:
        write_jointly(sink, source, own, talk, budget_nbytes=budget)
    return ExportReport(own.url, number, wish.form, count, nbytes, tuple(others), _notes(own))


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
