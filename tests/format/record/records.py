"""A record to be damaged, falsified and read again."""

from __future__ import annotations

import hashlib
import json

from hypothesis import strategies as st

from shardckpt.format.manifest import (
    FileEntry,
    LayoutEntry,
    Manifest,
    MeshEntry,
    Table,
    TensorEntry,
    encode_manifest,
)

KEYS = st.text(max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


RECORD = Manifest(
    step=1000,
    attempt="0123456789abcdef0123",
    created="2026-11-22T10:00:00Z",
    shard_of=(0, 1, 0, 1),
    files=(
        FileEntry("model.0.pt", 9000, 0xDEADBEEF, "model", 0, (4096, 100, 7), (4200, 50, 8)),
        FileEntry("rank_3.pt", 0, 0, "rank", 3),
        FileEntry("cc/tokenizer.json", 10, 1, "cc", 0),
    ),
    meshes=(MeshEntry(("dp", "tp"), (2, 2), (0, 1, 2, 3)),),
    layouts=(LayoutEntry("model"), LayoutEntry("rank", 0, ("SS(0,2)", "S(0)")), LayoutEntry("rank", 0, ("R", "S(1)"))),
    tables=(
        Table(
            (0, 2),
            {"model.w": TensorEntry("float32", (8, 4), 1), "model.n": TensorEntry("int64", (), 0)},
            {"a": "rank"},
        ),
        Table((1, 3), {"model.w": TensorEntry("float32", (8, 4), 2, 1)}, {"a": "rank", "step": "replicated"}),
    ),
    differ=("a",),
    mesh_sizes={"dp": 2, "tp": 2},
    versions={"torch": "2.13.0"},
    metadata={"loss": 2.5, "note": 'with "sha256": "inside', "nested": {"x": [1, None]}},
)
DATA = encode_manifest(RECORD)


def sign(body: bytes) -> bytes:
    """A record with a sum that is right, whatever it says."""
    return body + b'"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def signed(content: dict) -> bytes:
    content.pop("sha256", None)
    return sign(json.dumps(content).encode()[:-1] + b",\n")
