"""How programs name the files of their ranks. No torch."""

from __future__ import annotations

import re

from shardckpt.tools.moving.foreign.reading import Folder

ITEM = re.compile(r"(.+)_([0-9]{1,6})\.pt")
"""`<item>_<rank>.pt` of torch_checkpointing."""
RANK = re.compile(r"rank_([0-9]{1,6})(?:\.[0-9]+)?\.pt")
OF_SHARD = re.compile(r"(model|replicated)\.([0-9]{1,6})\.pt")
FOLDERS = ("model", "optimizer", "trainer", "data_reader")
"""Of a step of fairseq2 0.8, in which `pp_00/tp_00/sdp_00.pt`, `rank_00.pt`, `dp_00.pt` are."""
_NUMBERED = re.compile(r"(?:pp|tp|sdp|dp|rank)_([0-9]{1,6})(?:\.pt|/)")


def is_of_fairseq2(folder: Folder) -> bool:
    """Whether it is a step of fairseq2, of any version."""
    return any(RANK.fullmatch(name) or name in ("model.pt", "replicated.pt") for name in folder.names) or (
        has_folders(folder)
    )


def has_folders(folder: Folder) -> bool:
    """Whether it is a step of fairseq2 0.8."""
    return folder.has("model/") and Folder.of(folder.storage, folder.file("model")).has("pp_00/")


def is_of_items(folder: Folder) -> bool:
    """Whether it is a checkpoint of torch_checkpointing."""
    items = [name for name in folder.names if ITEM.fullmatch(name)]
    return bool(items) and (len(items) > 1 or folder.has("metadata.pkl"))


def numbered(folder: Folder) -> dict[int, str]:
    """The names `pp_00/`, `sdp_01.pt`, ... in a folder, by their numbers."""
    matches = ((name, _NUMBERED.fullmatch(name)) for name in folder.names)
    return {int(match[1]): name.rstrip("/") for name, match in matches if match is not None}
