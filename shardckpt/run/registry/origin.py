"""Where a run comes from: its code, the versions it runs with, the machine. Any one thread; nothing here fails."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

_GIT_S = 10
"""How long git may take, on a slow network disk; then there is no code version."""


@dataclass(frozen=True, slots=True)
class Code:
    """Which code it was."""

    commit: str
    dirty: bool | None
    """Whether tracked files differed from the commit; None if git did not say in time."""


def code_version(folder: str | os.PathLike[str]) -> Code | None:
    """The commit of the git repository that the folder lies in; None if it lies in none, or there is no git."""
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return Code(commit.strip(), None if changed is None else bool(changed.strip()))


def environment() -> dict[str, str]:
    """Versions, by name. What is not installed is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "shardckpt", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def host() -> str:
    return socket.gethostname()


def _git(folder: str | os.PathLike[str], *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", os.fspath(folder), *arguments]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=True, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout
