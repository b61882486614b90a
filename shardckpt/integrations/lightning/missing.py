"""A metric that is monitored, and that nobody has logged."""

from __future__ import annotations

import logging
from typing import Any

from shardckpt.integrations.frameworks import need

_log = logging.getLogger(__name__)


def say_missing(trainer: Any, monitor: str) -> None:
    """As `ModelCheckpoint` does: an error once validation has run, for then it would have been logged; before that,
    and where there is no validation, a warning. Without it no step is the best, and all but the newest would go."""
    names = sorted(trainer.callback_metrics)
    text = f"monitor={monitor!r}, but no such metric was logged: {names}. HINT: self.log({monitor!r}, value)"
    if trainer.fit_loop.epoch_loop.val_loop._has_run:
        raise need("lightning.pytorch.utilities.exceptions", extra="lightning").MisconfigurationException(text)
    if trainer.is_global_zero:
        _log.warning("%s", text)
