"""Every name that the engine writes or reads below a root, and the rules for names that come from a file.

step_1000/                      a committed step on a file system
step_1000.<attempt>.tmp/        an attempt under way on a file system (renamed at its commit)
step_1000.<attempt>.old/        a committed step that another attempt of the same step has just replaced
step_1000/<attempt>/            an attempt's files on an object store
.../manifest.json               the commit record
blobs/<digest>/<id>/frozen.pt   a file that several steps refer to (see `shardckpt/engine/writing/BLOBS.md`)
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

MANIFEST = "manifest.json"
SCORE = "score.txt"
METRICS = "metrics.json"
PINS = "pins"
"""A folder of the root: an object called like a step for each that is pinned."""
CARBON_COPY = "cc"
"""A folder of the root, and in a record the kind of the copies of what lies in it: no archives of ours."""
MODEL_KEY = "model_key"
"""In archives that hold state of the model, the key under which the name of the model's own key stands."""
CONSOLIDATED = "consolidated"
"""In a record, the kind of a `model.pt` that holds the whole model once more, beside the files of the ranks: every
tensor in one piece, under its name in the tables, and the model's Python values."""
SET_ASIDE = "damaged_"
"""How the name of a folder begins that a repair has set aside: neither a step nor an attempt, so it is never offered,
never swept and never chosen."""
METADATA = "metadata"
"""In a record, the kind of an archive of the user's own: metadata.<shard>.pt."""
BLOBS = "blobs"
"""A folder of the root: files that several steps may refer to. They lie there under a digest of their content."""
FROZEN = "frozen"
"""In a record, the kind of a file of tensors that do not change, which data-parallel ranks hold alike. It is a blob."""
FROZEN_OF_RANK = "frozen_rank"
"""The same for those that only one rank holds."""

LAST_STEP = 10**18 - 1
"""The highest number of a step."""

_STEP = re.compile(r"step_(0|[1-9][0-9]{0,17})")
_ASIDE = re.compile(r"step_(0|[1-9][0-9]{0,17})\.([0-9a-z]{8,64})\.(tmp|old)")
_ATTEMPT = re.compile(r"[0-9a-z]{8,64}")
_BLOB = re.compile(
    r"blobs/([0-9a-f]{64})/([0-9a-z]{8,64})/(frozen(?:\.(?:0|[1-9][0-9]{0,8}))?\.pt|frozen_rank_(?:0|[1-9][0-9]{0,8})\.pt)"
)
_BAD_IN_NAME = re.compile(r'[\x00-\x1f\x7f\ud800-\udfff\\:*?"<>|]')


@dataclass(frozen=True, slots=True)
class Aside:
    """A folder beside the steps: an attempt that did not commit ("tmp") or a step replaced by another ("old")."""

    step: int
    attempt: str
    kind: str
    folder: str


def new_attempt() -> str:
    """An id that no other attempt has or will have: 80 random bits. Drawn by rank 0 and told to all."""
    return secrets.token_hex(10)


def is_attempt(text: str) -> bool:
    return _ATTEMPT.fullmatch(text) is not None


def step_folder(step: int) -> str:
    if not 0 <= step <= LAST_STEP:
        raise ValueError(f"a step is a number from 0 to {LAST_STEP}, not {step}")
    return f"step_{int(step)}"


def parse_step(folder: str) -> int | None:
    """The step of a folder name, with or without the trailing slash of a listing; None for any other name."""
    match = _STEP.fullmatch(folder.rstrip("/"))
    return int(match[1]) if match else None


def aside_folder(step: int, attempt: str, kind: str) -> str:
    folder = f"{step_folder(step)}.{attempt}.{kind}"
    if parse_aside(folder) is None:
        raise ValueError(f"{folder} is not a name for an attempt: its id is 8 to 64 of 0-9a-z, its kind tmp or old")
    return folder


def parse_aside(folder: str) -> Aside | None:
    match = _ASIDE.fullmatch(folder.rstrip("/"))
    return Aside(int(match[1]), match[2], match[3], folder.rstrip("/")) if match else None


def model_file(shard: int, shards: int) -> str:
    """Model state of one model-parallel rank: `model.<r>.pt`, or `model.pt` where there is but one."""
    return f"model.{shard}.pt" if shards > 1 else "model.pt"


def replicated_file(shard: int, shards: int) -> str:
    return f"replicated.{shard}.pt" if shards > 1 else "replicated.pt"


def metadata_file(shard: int, shards: int) -> str:
    return f"metadata.{shard}.pt" if shards > 1 else "metadata.pt"


def rank_file(rank: int) -> str:
    return f"rank_{rank}.pt"


def frozen_file(shard: int, shards: int) -> str:
    return f"frozen.{shard}.pt" if shards > 1 else "frozen.pt"


def frozen_rank_file(rank: int) -> str:
    return f"frozen_rank_{rank}.pt"


def blob_folder(digest: str, number: str) -> str:
    """Where a blob of that content lies, alone. There may be several, with ids like those of attempts."""
    return f"{BLOBS}/{digest}/{number}"


def doomed_file(number: str) -> str:
    """Beside a blob, says that somebody is about to delete it: whoever saves must not refer to it any more."""
    return f"{number}.{new_attempt()}.doomed"


def doomed_blobs(names: Iterable[str]) -> set[str]:
    """The ids of the blobs that are about to be deleted, from the names below their digest."""
    return {name.partition(".")[0] for name in names if name.endswith(".doomed")}


def wanted_file(name: str) -> str:
    """On object stores, what an attempt puts into its folder before it looks for a blob for the file of that name."""
    return f"{name}.wanted"


def check_blob_key(key: str) -> str:
    """The key of a blob from a record, given back if it is just that; else `ValueError`."""
    if not isinstance(key, str) or _BLOB.fullmatch(key) is None:
        raise ValueError(f"{key if isinstance(key, str) else type(key).__name__!r:.200} is not the key of a blob")
    return key


def check_file_name(name: str) -> str:
    """A file name from a record, given back if it stays inside its checkpoint; else `ValueError`.

    Allowed are relative paths of plain parts ("rank_0.pt", "3f…/model.0.pt", "tokenizer/vocab.json").
    """
    if not isinstance(name, str):
        raise ValueError(f"a file name should be a text, not a {type(name).__name__}")
    parts = name.split("/")
    if not name or len(name) > 1024 or any(p in ("", ".", "..") for p in parts) or _BAD_IN_NAME.search(name):
        raise ValueError(f"{name!r} is not the name of a file inside a checkpoint")
    return name
