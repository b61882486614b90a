"""What is given to `resume_from_checkpoint`, as a step of ours or a folder of Trainer's own."""

from __future__ import annotations

import os
from pathlib import Path

from shardckpt.integrations.huggingface.parts import STATE_FILE
from shardckpt.manager.checkpoints import CheckpointManager
from shardckpt.manager.steps.resuming import Which

PREFIX = "checkpoint-"
"""What Trainer calls its folders; those of exports are called so, too."""


def which_of(text: str, *, here: str) -> Which:
    """As `resume` is asked for it. "out/checkpoint-500" is the name of an export: step 500 of this run, wherever that
    lies, if `out` is `here`, the folder of this training; else of the run at `out`."""
    above, _, name = text.rstrip("/").rpartition("/")
    number = name.removeprefix(PREFIX)
    if name == number or not number.isdigit():
        return text
    if "://" not in text and os.path.realpath(above or ".") == os.path.realpath(here):
        return int(number)
    return f"{above or '.'}/step_{number}"


def is_trainers_own(place: str | os.PathLike[str]) -> bool:
    """Whether Trainer itself has written it."""
    return os.path.isfile(os.path.join(place, STATE_FILE))


def newest_of_trainers_own(manager: CheckpointManager, folder: str) -> str | None:
    """The newest checkpoint in there that Trainer itself has written. Rank 0 looks, all are told the same."""

    def look() -> str | None:
        found = [path for path in Path(folder).glob(f"{PREFIX}*") if is_trainers_own(path)]
        numbers = {int(number): path for path in found if (number := path.name.removeprefix(PREFIX)).isdigit()}
        return str(numbers[max(numbers)]) if numbers else None

    answer = manager._do("trainer's own", look)
    return None if answer is None else str(answer)
