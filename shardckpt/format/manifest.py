"""The commit record, `manifest.json`. No torch.

It holds what a loader needs to find its bytes without opening every file, and it grows with tensors plus ranks,
not with their product: a sharded tensor is described once, by its placement on a mesh; ranks that hold the same
keys share one table. The last line is a SHA-256 over all bytes before it: a record is whole or it is none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from shardckpt.format.consistency import check_manifest
from shardckpt.format.index import (
    MAX_NUMBERS,
    as_dtype,
    as_json_has_it,
    as_numbers,
    as_pieces,
    as_shape,
    as_size,
    as_text,
    as_texts,
    as_truth,
    count_numbers,
    load_json,
    runs_of,
    shown,
)
from shardckpt.format.placement import Piece
from shardckpt.format.record.columns import FileColumns, in_columns, loose
from shardckpt.format.record.files import Extent as Extent
from shardckpt.format.record.files import FileEntry as FileEntry
from shardckpt.format.record.files import encode_file
from shardckpt.format.record.packing import decode_files, encode_files, numbers_in

FORMAT = 1
"""Of a record whose files all lie in the step's folder."""
FORMAT_WITH_BLOBS = 2
"""Of a record that refers to blobs: a version that knows of none must not take the step for whole, or for damaged."""
FORMAT_IN_COLUMNS = 3
"""Of a record of many files, which has them in columns (see `record.columns`), blobs or not."""
FORMATS = (FORMAT, FORMAT_WITH_BLOBS, FORMAT_IN_COLUMNS)

Home = Literal["model", "replicated", "rank", "frozen", "frozen_rank"]
"""In which kind of file a key lies: model.<shard>.pt, replicated.<shard>.pt, rank_<rank>.pt; or, of tensors that do not
change from step to step, frozen.<shard>.pt or frozen_rank_<rank>.pt."""

HOMES: tuple[Home, ...] = ("model", "replicated", "rank", "frozen", "frozen_rank")
VALUE_HOMES: tuple[Home, ...] = HOMES[:3]
"""Where Python values may lie."""
OF_RANK: frozenset[Home] = frozenset({"rank", "frozen_rank"})
"""Of these each rank has a file of its own."""


@dataclass(frozen=True, slots=True)
class MeshEntry:
    """A device mesh: names and sizes of its dimensions, and the global ranks in row-major order."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    _hash: int = field(default=0, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Hashed once: it is a key for every tensor, and may have 10,000 ranks. Numbers hash alike anywhere."""
        object.__setattr__(self, "_hash", hash((self.shape, self.ranks)))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True)
class LayoutEntry:
    """How tensors lie: in which home and, if sharded, by which placements on which mesh; or else in pieces."""

    home: Home
    mesh: int | None = None
    placements: tuple[str, ...] = ()
    pieces: tuple[Piece, ...] = ()
    given: tuple[str, ...] = ()
    """The dimensions of the mesh that the tensors themselves know of, if not all: they were on a mesh of these."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as a whole: dtype, global shape, which layout, and which replica of a shard was written."""

    dtype: str
    shape: tuple[int, ...]
    layout: int
    replica: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """What some ranks hold alike in kind: their tensors and their Python values (key to home)."""

    ranks: tuple[int, ...]
    tensors: Mapping[str, TensorEntry]
    values: Mapping[str, Home]
    text: str = field(default="", init=False, compare=False, repr=False)
    """Its JSON, if that has been made already (see `spelled`). Of a copy with `replace` it is not known."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The record of one committed step."""

    step: int
    attempt: str
    created: str
    """UTC, ISO 8601."""
    shard_of: tuple[int, ...]
    """For every global rank its model-parallel shard: the number in model.<shard>.pt. Its length is the world size."""
    files: Sequence[FileEntry]
    """Of a step of many ranks not objects, but columns (`FileColumns`)."""
    meshes: tuple[MeshEntry, ...] = ()
    layouts: tuple[LayoutEntry, ...] = ()
    tables: tuple[Table, ...] = ()
    differ: tuple[str, ...] = ()
    """Keys that several files hold with different content: such a key belongs to its rank (or shard)."""
    mesh_sizes: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    model_key: str = "model"
    """The top-level key of the model's state."""
    model_only: bool = False
    """Whether only the model was kept, or saved: nothing to go on training from."""

    @property
    def world_size(self) -> int:
        return len(self.shard_of)

    @property
    def shards(self) -> int:
        return max(self.shard_of, default=0) + 1

    @property
    def nbytes(self) -> int:
        """All bytes of its files."""
        return self.files.nbytes if isinstance(self.files, FileColumns) else sum(file.nbytes for file in self.files)

    @property
    def shared_nbytes(self) -> int:
        """Of these, the bytes in blobs, which other steps may refer to as well."""
        return sum(file.nbytes for file in loose(self.files) if file.blob)

    @property
    def parts(self) -> tuple[str, ...]:
        """The top-level keys that are present: "model", "optimizer", "rng", ..."""
        keys = {key.split(".", 1)[0] for table in self.tables for key in (*table.tensors, *table.values)}
        return tuple(sorted(keys))

    def is_of_model(self, key: str) -> bool:
        """Whether a tensor or value of this name is of the model's state."""
        return key == self.model_key or key.startswith(f"{self.model_key}.")


def encode_manifest(manifest: Manifest) -> bytes:
    """The record as it is stored. `ValueError` for one that could not be read again."""
    check_manifest(manifest)
    files = in_columns(manifest.files)
    content = {
        "format": _format_of(files),
        "step": manifest.step,
        "attempt": manifest.attempt,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "mesh": dict(manifest.mesh_sizes),
        "shard_of": runs_of(manifest.shard_of),
        "parts": manifest.parts,
        "files": encode_files(files) if files.families else [encode_file(file) for file in files],
        "meshes": [_encode_mesh(mesh) for mesh in manifest.meshes],
        "layouts": [
            {k: v for k, v in asdict(at).items() if v or k not in ("pieces", "given")} for at in manifest.layouts
        ],
        "tables": (),
        "differ": manifest.differ,
        "versions": dict(manifest.versions),
        "metadata": as_json_has_it(manifest.metadata),
    }
    if manifest.model_key != "model":
        content["model_key"] = manifest.model_key
    if manifest.model_only:
        content["model_only"] = True
    texts = {key: _dumps(value) for key, value in content.items()}
    texts["tables"] = f"[{','.join(table.text or _dumps(encode_table(table)) for table in manifest.tables)}]"
    lines = ",\n".join(f'"{key}": {text}' for key, text in texts.items())
    body = f"{{\n{lines},\n"
    return f'{body}"sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()


def decode_manifest(data: bytes) -> Manifest:
    """The record again. `data` is untrusted: `ValueError` for whatever is not a whole, well-formed record."""
    body, mark, rest = data.rpartition(b'"sha256": "')
    if not mark or rest[64:] != b'"\n}\n' or hashlib.sha256(body).hexdigest().encode() != rest[:64]:
        raise ValueError("its SHA-256 does not agree: it is damaged, truncated or not a record of shardckpt")
    try:
        return _decode(load_json(data))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not a well-formed record: {type(error).__name__}: {error}") from error


def encode_table(table: Table) -> dict[str, Any]:
    """A table as JSON, as it stands in the record and travels from a rank to rank 0."""
    entries = list(table.tensors.values())
    return {
        "ranks": runs_of(table.ranks),
        "tensors": {
            "name": list(table.tensors),
            "dtype": [e.dtype for e in entries],
            "shape": [list(e.shape) for e in entries],
            "layout": [e.layout for e in entries],
            "replica": [e.replica for e in entries],
        },
        "values": {home: [key for key, at in table.values.items() if at == home] for home in VALUE_HOMES},
    }


def spelled(table: Table) -> Table:
    """The same table, which keeps its JSON: for one that stands in the records of many steps."""
    same = replace(table)
    object.__setattr__(same, "text", _dumps(encode_table(table)))
    return same


def _dumps(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def decode_table(content: Mapping[str, Any]) -> Table:
    """A table from JSON; whether its layouts are there is for the record to say."""
    columns = content["tensors"]
    rows = zip(columns["dtype"], columns["shape"], columns["layout"], columns["replica"], strict=True)
    entries = [TensorEntry(as_dtype(d), as_shape(s), as_size(at), as_size(copy)) for d, s, at, copy in rows]
    names = as_texts(columns["name"])
    values = [(key, home) for home in VALUE_HOMES for key in as_texts(content["values"][home])]
    keys = {*names, *(key for key, _ in values)}
    if len(keys) != len(names) + len(values):
        raise ValueError("a key of a table is given twice")
    return Table(as_numbers(content["ranks"]), dict(zip(names, entries, strict=True)), dict(values))


def _format_of(files: Sequence[FileEntry]) -> int:
    if isinstance(files, FileColumns) and files.families:
        return FORMAT_IN_COLUMNS
    return FORMAT_WITH_BLOBS if any(file.blob for file in files) else FORMAT


def _decode(content: Mapping[str, Any]) -> Manifest:
    if content["format"] not in FORMATS:
        known = f"formats {', '.join(map(str, FORMATS))}"
        raise ValueError(f"its format is {shown(content['format'])}, but this version reads {known}")
    lists = [content["shard_of"], *(part["ranks"] for key in ("meshes", "tables") for part in content[key])]
    lists += numbers_in(content["files"])
    if sum(count_numbers(runs) for runs in lists) > MAX_NUMBERS:
        raise ValueError("it names more ranks than any job has")
    manifest = Manifest(
        step=as_size(content["step"]),
        attempt=as_text(content["attempt"]),
        created=as_text(content["created"]),
        shard_of=as_numbers(content["shard_of"]),
        files=decode_files(content["files"]),
        meshes=tuple([_decode_mesh(mesh) for mesh in content["meshes"]]),
        layouts=tuple([_decode_layout(layout) for layout in content["layouts"]]),
        tables=tuple([decode_table(table) for table in content["tables"]]),
        differ=as_texts(content["differ"]),
        mesh_sizes={key: as_size(size) for key, size in content["mesh"].items()},
        versions={key: as_text(text) for key, text in content["versions"].items()},
        metadata={**content["metadata"]},
        model_key=as_text(content.get("model_key", "model")),
        model_only=as_truth(content.get("model_only", False)),
    )
    check_manifest(manifest)
    if content["format"] != _format_of(manifest.files):
        form = _format_of(manifest.files)
        raise ValueError(f"a record of format {content['format']} with what only format {form} has")
    if content["world_size"] != manifest.world_size or content["parts"] != list(manifest.parts):
        raise ValueError("its world size or its parts are not those of its tables")
    return manifest


def _encode_mesh(mesh: MeshEntry) -> dict[str, Any]:
    return {"dims": mesh.dims, "shape": mesh.shape, "ranks": runs_of(mesh.ranks)}


def _decode_mesh(content: Mapping[str, Any]) -> MeshEntry:
    return MeshEntry(as_texts(content["dims"]), as_shape(content["shape"]), as_numbers(content["ranks"]))


def _decode_layout(content: Mapping[str, Any]) -> LayoutEntry:
    home, mesh, pieces = content["home"], content["mesh"], as_pieces(content.get("pieces", []))
    if home not in HOMES:
        raise ValueError(f"{shown(home)} is no kind of file")
    given = as_texts(content.get("given", []))
    return LayoutEntry(home, None if mesh is None else as_size(mesh), as_texts(content["placements"]), pieces, given)
