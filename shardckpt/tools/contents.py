"""All that lies in a run and could be a checkpoint, in force or not. One look each; nothing is remembered. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardckpt.format.layout import MANIFEST, SET_ASIDE, Aside, is_attempt, parse_aside, parse_step
from shardckpt.run.catalog import Catalog, Entry
from shardckpt.run.requests import each
from shardckpt.storage.base import RenamingStorage, Storage
from shardckpt.tools.place import ARCHIVES
from shardckpt.tools.report import Standing


@dataclass(frozen=True, slots=True)
class Found:
    """A folder that is no committed step."""

    step: int | None
    folder: str
    standing: Standing
    attempt: str | None = None


def leftovers(storage: Storage, committed: Sequence[Entry], *, since: int | None = None, of: str = "") -> list[Found]:
    """What looks like a step and is not in force, by folder; from the step `since` on, or in this folder alone."""
    in_force = {entry.folder for entry in committed}
    found, look = list[Found](), list[str]()
    renames = isinstance(storage, RenamingStorage)  # a look at a protocol takes 50 us, and there may be many steps
    for name in (name.rstrip("/") for name in storage.list() if name.endswith("/")):
        aside, step = parse_aside(name), parse_step(name)
        if (of or name) != name or (since is not None and _number(aside, step) < since):
            continue
        if name.startswith(SET_ASIDE):
            found.append(Found(parse_step(name.removeprefix(SET_ASIDE).partition(".")[0]), name, "set aside"))
        elif aside is not None and name not in in_force:
            standing: Standing = "replaced" if aside.kind == "old" else "uncommitted"
            found.append(Found(aside.step, name, standing, aside.attempt))
        elif step is not None and renames and name not in in_force:
            found.append(Found(step, name, "uncommitted"))
        elif step is not None and not renames:
            look.append(name)
    named = {entry.attempt_folder for entry in committed}
    for more in each(lambda folder: _attempts(storage, folder, named), look):
        found += more
    return found


def _number(aside: Aside | None, step: int | None) -> float:
    """Of what has none, one that is never too low."""
    number = step if aside is None else aside.step
    return math.inf if number is None else number


def _attempts(storage: Storage, folder: str, named: set[str]) -> list[Found]:
    """On an object store: the attempts of a step that its record does not name."""
    names = storage.list(folder)
    found = [
        Found(parse_step(folder), f"{folder}/{name[:-1]}", "uncommitted", name[:-1])
        for name in names
        if name.endswith("/") and is_attempt(name[:-1]) and f"{folder}/{name[:-1]}" not in named
    ]
    if found and MANIFEST in names and folder in named:
        return []  # its record is damaged: any of them may be its own
    return found


def committed(storage: Storage) -> list[Entry]:
    """As the catalog says."""
    return Catalog(storage).entries()


def foreign_folders(storage: Storage) -> list[str]:
    """Where checkpoints of others may lie: this folder itself ("") if it has such files, else the folders in it."""
    names = storage.list()
    if any(is_archive(name) for name in names):
        return [""]
    folders = [name[:-1] for name in names if name.endswith("/")]
    inside = each(storage.list, folders)
    return [folder for folder, those in zip(folders, inside, strict=True) if any(map(is_archive, those))]


def is_archive(name: str) -> bool:
    return name.endswith(ARCHIVES)


def files_below(storage: Storage, folder: str) -> list[str]:
    """The names of all files below a folder, relative to it."""
    found, waiting = list[str](), [""]
    for inside in waiting:  # grows as it goes
        for name in storage.list("/".join(part for part in (folder, inside) if part)):
            path = f"{inside}/{name}" if inside else name
            (waiting if name.endswith("/") else found).append(path.rstrip("/"))
    return found
