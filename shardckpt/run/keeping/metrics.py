"""Metrics: `metrics.json` beside a committed step's files, numbers by name. Rank 0 only, in any one thread.

As a score, they come after the commit and are no part of the record; they lie in the folder of the attempt, so that a
step that is saved again begins without any.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import SupportsFloat

from shardckpt.errors import CheckpointLoadError, CheckpointNotFoundError, CheckpointSaveError, InvalidStateError
from shardckpt.format.layout import METRICS
from shardckpt.run.catalog import Entry
from shardckpt.run.requests import each
from shardckpt.run.retention import SCORE
from shardckpt.storage.base import Storage

_log = logging.getLogger(__name__)


def plain_metrics(metrics: Mapping[str, SupportsFloat]) -> dict[str, float]:
    """As numbers; `InvalidStateError` for what is none, for NaN, and for the name of the score."""
    plain = {}
    for name, value in metrics.items():
        try:
            plain[str(name)] = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InvalidStateError(f"the metric {name!r:.40} is a number, not {value!r:.80}: {error}") from error
        if math.isnan(plain[str(name)]):
            raise InvalidStateError(
                f"the metric {name!r:.40} is NaN, neither better nor worse than others: leave it out"
            )
    if SCORE in plain:
        raise InvalidStateError(f"{SCORE!r} is what save_score stores: use it, or another name")
    return plain


def metrics_key(entry: Entry) -> str:
    return f"{entry.attempt_folder}/{METRICS}"


def write_metrics(storage: Storage, entry: Entry, *, metrics: Mapping[str, float]) -> None:
    """Give a committed step these metrics, beside those that it has. `CheckpointSaveError` if they cannot be stored."""
    together = {**(_read(storage, entry) or {}), **metrics}
    try:
        storage.replace(metrics_key(entry), encode_metrics(together))
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"step {entry.step} cannot be measured: {error}", step=entry.step) from error
    except OSError as error:
        raise CheckpointSaveError(
            f"the metrics of step {entry.step} were not saved: {error}", step=entry.step
        ) from error


def encode_metrics(metrics: Mapping[str, float]) -> bytes:
    """The file's content. JSON has no infinity, which stands in it as a text."""
    content = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def read_metrics(storage: Storage, entries: Sequence[Entry]) -> dict[int, Mapping[str, float] | None]:
    """The metrics by step, by one request each; None of a step whose metrics are damaged, which is logged."""
    return {
        entry.step: found
        for entry, found in zip(entries, each(lambda entry: _read(storage, entry), entries), strict=True)
    }


def _read(storage: Storage, entry: Entry) -> dict[str, float] | None:
    try:
        content = json.loads(storage.read(metrics_key(entry)))
        return {str(name): float(value) for name, value in content.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointLoadError(
            f"the metrics of step {entry.step} cannot be read now: {error}", step=entry.step
        ) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("%s/%s is damaged: %s; save the metrics again", storage.url, metrics_key(entry), error)
        return None
