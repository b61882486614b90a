"""Write safetensors as Hugging Face shards them, by ourselves: no tensor, and no file, is ever in memory whole.

A file is 8 bytes (the length of the header, little-endian), a header in JSON, padded with spaces to 8 bytes, and the
tensors without gaps. Sources: the README of `safetensors`; `serialize` in its `tensor.rs`, which lays wide elements
before narrow ones, so that each tensor is aligned; `split_torch_state_dict_into_shards` of `huggingface_hub`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardckpt.errors import InvalidStateError
from shardckpt.format.index import ITEMSIZE
from shardckpt.tools.exporting.sink import FileSet, FileSink
from shardckpt.tools.moving.foreign.safetensors_source import DTYPES, INDEX_ENDING, MOST_HEADER
from shardckpt.tools.moving.seam import TensorFacts, TensorSource
from shardckpt.tools.moving.writing.part import OnePart, only_tensors
from shardckpt.tools.moving.writing.stream import FileContent
from shardckpt.tools.place import Where

MAX_FILE_NBYTES = 5_000_000_000
"""Bytes of tensors in a file, as `save_pretrained` counts."""
_ENDING = ".safetensors"
_NAMES = {ours: name for name, ours in DTYPES.items()}
_METADATA = "__metadata__"


@dataclass(slots=True)
class _File:
    """The tensors of a file, (name, its name in the source, what it is)."""

    tensors: list[tuple[str, str, TensorFacts]] = field(default_factory=list)
    nbytes: int = 0

    def content(self, name: str, ties: Mapping[str, str]) -> FileContent:
        return FileContent(name, [_header(self, ties), *((own, facts.nbytes) for _, own, facts in self.tensors)])


class SafetensorsSink(FileSink):
    """A `TensorSink` for one part of a state, most often the model; its key is taken off the names.

    A folder gets `model.safetensors`, or `model-00001-of-0000N.safetensors` and `model.safetensors.index.json`; a name
    that ends in ".safetensors" is that file, or gives its name to several. Tied tensors are written once, under the
    first of their names, and the others are noted as `safetensors.torch.save_model` does it. The file that makes the
    others count, which is the index or the only file, comes last.
    """

    ENDINGS = (_ENDING,)

    def __init__(
        self,
        where: Where,
        *,
        max_file_nbytes: int = MAX_FILE_NBYTES,
        beside: Mapping[str, bytes] | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """A tensor that is larger than `max_file_nbytes` has a file of its own."""
        super().__init__(where, beside=beside, storage_options=storage_options)
        if max_file_nbytes < 1:
            raise ValueError(f"a file of at most {max_file_nbytes} bytes holds nothing")
        self._most = max_file_nbytes

    def files(self, source: TensorSource, file: str) -> FileSet:
        part = only_tensors(source)
        files = _planned(source, part, self._most)
        stem = file.removesuffix(_ENDING) or "model"
        names = [f"{stem}-{n:05}-of-{len(files):05}{_ENDING}" for n in range(1, len(files) + 1)]
        names = names if len(files) > 1 else [f"{stem}{_ENDING}"]
        contents = [each.content(name, part.ties) for name, each in zip(names, files, strict=True)]
        if len(files) > 1:
            contents.append(FileContent(f"{stem}{INDEX_ENDING}", [_index(names, files)]))
        return FileSet(lambda crcs: contents)


def _planned(source: TensorSource, part: OnePart, most_nbytes: int) -> list[_File]:
    """Which file has which tensors, in the source's order; within a file, wide elements come first."""
    known, files = source.tensors, [_File()]
    unknown = sorted({known[own].dtype for own in part.tensors.values()} - _NAMES.keys())
    if unknown:
        raise InvalidStateError(f"safetensors has no name for tensors of {', '.join(unknown)}: write a .pt file")
    if _METADATA in part.tensors:
        raise InvalidStateError(f"no tensor in safetensors can be called {_METADATA!r}")
    for name, own in part.tensors.items():
        facts = known[own]
        if files[-1].tensors and files[-1].nbytes + facts.nbytes > most_nbytes:
            files.append(_File())
        files[-1].tensors.append((name, own, facts))
        files[-1].nbytes += facts.nbytes
    for file in files:
        file.tensors.sort(key=lambda item: -ITEMSIZE[item[2].dtype])
    return files


def _header(file: _File, ties: Mapping[str, str]) -> bytes:
    here = {name for name, _, _ in file.tensors}
    metadata = {"format": "pt"} | {name: kept for name, kept in ties.items() if kept in here and name != "format"}
    text = json.dumps({_METADATA: metadata, **dict(_entries(file))}, separators=(",", ":"), ensure_ascii=False)
    content = text.encode()
    content += b" " * (-len(content) % 8)
    if len(content) > MOST_HEADER:
        raise InvalidStateError(f"{len(here)} tensors need a header of {len(content)} bytes: make smaller files")
    return len(content).to_bytes(8, "little") + content


def _entries(file: _File) -> Iterator[tuple[str, object]]:
    at = 0
    for name, _, facts in file.tensors:
        end = at + facts.nbytes
        yield name, {"dtype": _NAMES[facts.dtype], "shape": list(facts.shape), "data_offsets": [at, end]}
        at = end


def _index(names: Sequence[str], files: Sequence[_File]) -> bytes:
    weight_map = {name: key for key, file in zip(names, files, strict=True) for name, _, _ in file.tensors}
    content = {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": weight_map}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
