"""Write any checkpoint as one `.pt` file, which `torch.load(path, mmap=True, weights_only=True)` and zip tools open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from shardckpt.storage.base import Buffer
from shardckpt.storage.wrapping import StorageWrapper
from shardckpt.tools.moving.foreign.nesting import walk
from shardckpt.tools.moving.seam import TensorName, TensorSource
from shardckpt.tools.moving.writing.archive import ArchiveFile
from shardckpt.tools.moving.writing.outlet import Outlet, outlet
from shardckpt.tools.moving.writing.stream import LEAST_BUDGET
from shardckpt.tools.place import Where


class ArchiveSink:
    """A `TensorSink` that makes one archive. A model alone is written as its own state dict, without its key in front;
    all else as the state by its parts. Tied tensors share their memory, as they do in a file of `torch.save`.

    A name that ends in ".pt", ".pth", ".bin" or ".ckpt" is that file; in a folder it is called `pytorch_model.bin`,
    which is where Hugging Face looks, or `checkpoint.pt` if it holds more than a model.
    """

    ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
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
        self._where, self._options = where, storage_options
        self._beside = dict(beside or {})

    def write(self, source: TensorSource, *, budget_nbytes: int) -> None:
        """Write it; the source is read twice. `CheckpointSaveError` if it is there already or cannot be written,
        `InvalidStateError` for what no archive can hold, what the source raises for what it cannot read. Then nothing
        of it is there."""
        is_model = isinstance(source.tree, Mapping) and list(source.tree) == ["model"]
        file = ArchiveFile()
        tree = source.tree["model"] if is_model else source.tree
        file.tree = walk(tree, TensorName, partial(file.take, facts=source.tensors, ties=source.ties))
        with outlet(self._where, endings=self.ENDINGS, storage_options=self._options) as out:
            for name, content in {} if out.file else self._beside.items():
                out.put(name, [content])
            name = out.file or ("pytorch_model.bin" if is_model else "checkpoint.pt")
            file.put(_Through(out), name, source, budget=max(budget_nbytes, LEAST_BUDGET))


class _Through(StorageWrapper):
    """Puts through an outlet."""

    def __init__(self, out: Outlet) -> None:
        super().__init__(out.storage)
        self._out = out

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        return self._out.put(key, parts)
