"""What all sinks have in common that make files which nobody counts as a checkpoint of ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import ClassVar

from shardckpt.tools.exporting.summing import checked, crcs_of, sums_of, unsummed
from shardckpt.tools.moving.seam import TensorFacts, TensorSource
from shardckpt.tools.moving.writing.outlet import file_of, outlet
from shardckpt.tools.moving.writing.stream import LEAST_BUDGET, FileContent
from shardckpt.tools.place import Where


@dataclass(frozen=True)
class FileSet:
    """The files of one write. The last of them is the one that makes the others count."""

    contents: Callable[[Mapping[str, int]], Sequence[FileContent]]
    """Made of the CRCs of the tensors in `crcs`; how long what is, does not depend on them."""
    crcs: Mapping[str, TensorFacts] = field(default_factory=dict)
    """The tensors whose CRCs must be known before any byte is written."""


class FileSink(ABC):
    """A `TensorSink` that makes files in a folder, or one file."""

    ENDINGS: ClassVar[tuple[str, ...]]
    """How the name of a file ends."""

    def __init__(
        self,
        where: Where,
        *,
        beside: Mapping[str, bytes] | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """`where`: the folder or file; a path, URL or empty `Storage`. `beside`: small files that go into a folder with
        it."""
        self.where, self.storage_options = where, storage_options
        self.beside = dict(beside or {})

    @abstractmethod
    def files(self, source: TensorSource, file: str) -> FileSet:
        """What is to be written. `file`: the name that was asked for, if it was that of a file. `InvalidStateError` for
        what the form cannot hold."""

    def write(self, source: TensorSource, *, budget_nbytes: int) -> None:
        """Write it. `CheckpointSaveError` if it is there already or cannot be written, `InvalidStateError` for what
        the form cannot hold, what the source raises for what it cannot read. Then nothing of it is there."""
        budget = max(budget_nbytes, LEAST_BUDGET)
        files = self.files(source, file_of(self.where, self.ENDINGS))
        with outlet(self.where, endings=self.ENDINGS, storage_options=self.storage_options) as out:
            for name, content in {} if out.file else self.beside.items():
                out.put(name, [content])
            twice = unsummed(source, files.crcs)
            extents = ((name, 0, facts.nbytes) for name, facts in twice.items())
            before = sums_of(source, extents, budget_nbytes=budget)
            for file in files.contents(crcs_of(source, files.crcs, before)):
                own = {name: before[name] for name in file.tensors if name in before}
                with closing(checked(source, file.segments, own, budget_nbytes=budget)) as parts:
                    out.put(file.name, parts)
