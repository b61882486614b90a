"""The commit record, `manifest.json`. No torch.

It holds what a loader needs to find its bytes without opening every file, and it grows with tensors plus ranks,
not with their product: a sharded tensor is described once, by its placement on a mesh; ranks that hold the same
keys share one table. The last line is a SHA-256 over all bytes before it: a record is whole or it is none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shardckpt.format.consistency import check_manifest
from shardckpt.format.index import (
    MAX_NUMBERS,
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
from shardckpt.format.record.columns import FileColumns, in_columns, loose
from shardckpt.format.record.files import Extent as Extent
from shardckpt.format.record.files import FileEntry as FileEntry
from shardckpt.format.record.files import encode_file
from shardckpt.format.record.packing import decode_files, encode_files, numbers_in
from shardckpt.format.record.tables import HOMES as HOMES
from shardckpt.format.record.tables import OF_RANK as OF_RANK
from shardckpt.format.record.tables import VALUE_HOMES as VALUE_HOMES
from shardckpt.format.record.tables import Home as Home
from shardckpt.format.record.tables import LayoutEntry as LayoutEntry
from shardckpt.format.record.tables import MeshEntry as MeshEntry
from shardckpt.format.record.tables import Table as Table
from shardckpt.format.record.tables import TensorEntry as TensorEntry
from shardckpt.format.record.tables import decode_table as decode_table
from shardckpt.format.record.tables import dumps, tops_of
from shardckpt.format.record.tables import encode_table as encode_table
from shardckpt.format.record.tables import spelled as spelled

FORMAT = 1
"""Of a record whose files all lie in the step's folder."""
FORMAT_WITH_BLOBS = 2
"""Of a record that refers to blobs: a version that knows of none must not take the step for whole, or for damaged."""
FORMAT_IN_COLUMNS = 3
"""Of a record of many files, which has them in columns (see `record.columns`), blobs or not."""
FORMATS = (FORMAT, FORMAT_WITH_BLOBS, FORMAT_IN_COLUMNS)


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
        return tuple(sorted({top for table in self.tables for top in table.tops or tops_of(table)}))

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
    texts = {key: dumps(value) for key, value in content.items()}
    texts["tables"] = f"[{','.join(table.text or dumps(encode_table(table)) for table in manifest.tables)}]"
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
