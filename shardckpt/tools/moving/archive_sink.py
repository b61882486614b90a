"""Write any checkpoint as one `.pt` file, which `torch.load(path, mmap=True, weights_only=True)` and zip tools open."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from shardckpt.tools.exporting.sink import FileSet, FileSink
from shardckpt.tools.moving.foreign.nesting import walk
from shardckpt.tools.moving.seam import TensorName, TensorSource
from shardckpt.tools.moving.writing.archive import ArchiveFile


class ArchiveSink(FileSink):
    """A `TensorSink` that makes one archive. A model alone is written as its own state dict, without its key in front;
    all else as the state by its parts. Tied tensors share their memory, as they do in a file of `torch.save`.

    A name that ends in ".pt", ".pth", ".bin" or ".ckpt" is that file; in a folder it is called `pytorch_model.bin`,
    which is where Hugging Face looks, or `checkpoint.pt` if it holds more than a model.
    """

    ENDINGS = (".pt", ".pth", ".bin", ".ckpt")

    def files(self, source: TensorSource, file: str) -> FileSet:
        is_model = isinstance(source.tree, Mapping) and list(source.tree) == ["model"]
        archive = ArchiveFile()
        tree = source.tree["model"] if is_model else source.tree
        archive.tree = walk(tree, TensorName, partial(archive.take, facts=source.tensors, ties=source.ties))
        name = file or ("pytorch_model.bin" if is_model else "checkpoint.pt")
        return FileSet(lambda crcs: [archive.content(name, crcs)[0]], archive.own)
