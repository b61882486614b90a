"""What no tracked file may name: places and registries of the machine that it was written on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_PLACES = ("wor" + "k", "root/.py" + "env", "opt/wh" + "eels", "opt/py" + "pi", "tmp/bash" + "_jobs")
_HOSTS = (
    "py" + "pi.org",
    "python" + "hosted.org",
    "npm" + "js.org",
    "deb." + "debian.org",
    "download." + "pytorch.org",
)
_FORBIDDEN = re.compile(
    r"(?<![\w.~}/])/(?:" + "|".join(_PLACES) + r")/" + "|" + "|".join(re.escape(host) for host in _HOSTS)
)


def problems(root: Path, files: Iterable[str]) -> list[str]:
    """Place and word of every finding in these text files; others are passed over."""
    found = []
    for name in files:
        try:
            lines = (root / name).read_text().splitlines()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        found += [
            f"{name}:{number}: {hit[0]}" for number, line in enumerate(lines, 1) for hit in _FORBIDDEN.finditer(line)
        ]
    return found
