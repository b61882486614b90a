"""Scores: `score.txt` beside a committed step's files, one number as the user gave it. Rank 0 only, in any one thread.

A score comes after the commit and is no part of the record; it is replaced atomically. Whether more or less is better
is a matter of the policy that looks at it, never of the file. It lies in the folder of the attempt, so that a step
that is saved again begins without a score on every kind of storage.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import SupportsFloat

from shardckpt.errors import CheckpointLoadError, CheckpointNotFoundError, CheckpointSaveError
from shardckpt.format.layout import SCORE
from shardckpt.run.catalog import Entry
from shardckpt.run.requests import each
from shardckpt.storage.base import Storage

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores by step; a step that is in neither has none."""

    by_step: Mapping[int, float] = field(default_factory=dict)
    damaged: Mapping[int, str] = field(default_factory=dict)
    """Steps whose score is there but is no number, and why: nobody knows whether they are the best."""


def score_key(entry: Entry) -> str:
    return f"{entry.attempt_folder}/{SCORE}"


def write_score(storage: Storage, entry: Entry, *, score: SupportsFloat) -> None:
    """Give a committed step its score, or another one. Any number but NaN, also a 0-dim tensor.

    `ValueError` for NaN, `CheckpointSaveError` if it cannot be stored; the old score, if any, is then still there.
    """
    content = encode_score(score)
    try:
        storage.replace(score_key(entry), content)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"step {entry.step} cannot be scored: {error}", step=entry.step) from error
    except OSError as error:
        raise CheckpointSaveError(f"the score of step {entry.step} was not saved: {error}", step=entry.step) from error


def read_scores(storage: Storage, entries: Sequence[Entry]) -> Scores:
    """The scores of these steps, by one request each. A damaged one is logged and reported, not raised."""
    by_step: dict[int, float] = {}
    damaged: dict[int, str] = {}
    for entry, content in zip(entries, each(lambda entry: _read(storage, entry), entries), strict=True):
        try:
            if content is not None:
                by_step[entry.step] = decode_score(content)
        except ValueError as error:
            damaged[entry.step] = str(error)
            _log.warning("%s/%s: %s; save the score again", storage.url, score_key(entry), error)
    return Scores(by_step, damaged)


def encode_score(score: SupportsFloat) -> bytes:
    """The file's content: the shortest decimal that gives the same number back."""
    number = float(score)
    if math.isnan(number):
        raise ValueError("a score cannot be NaN, for it is neither better nor worse than any other: leave it out")
    return f"{number!r}\n".encode()


def decode_score(content: bytes) -> float:
    """The number again; `ValueError` for anything else."""
    try:
        number = float(content.decode("ascii"))
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"{content[:40]!r} is not a score")
    return number


def _read(storage: Storage, entry: Entry) -> bytes | None:
    try:
        return storage.read(score_key(entry))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointLoadError(
            f"the score of step {entry.step} cannot be read now: {error}", step=entry.step
        ) from error
