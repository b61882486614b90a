"""The examples in Markdown: each Python block says, in a comment before it, how it is kept true.

<!-- run -->            it runs as it stands, in an empty folder
<!-- launch/x.py -->    it is that file, word for word
<!-- sketch -->         neither; it shows a shape
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"(?:<!-- (?P<mark>\S+(?: \S+)?) -->\n+)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One Python block of a Markdown file."""

    place: str
    mark: str
    """Empty if there is none."""
    code: str


def examples(root: Path, *files: str) -> list[Example]:
    """All Python blocks of these files."""
    return [
        Example(f"{file}:{text.count(chr(10), 0, block.start('code'))}", block["mark"] or "", block["code"])
        for file in files
        for text in [(root / file).read_text()]
        for block in _BLOCK.finditer(text)
    ]


def problems(root: Path, *files: str) -> list[str]:
    """Blocks without a mark, and blocks that differ from their file."""
    found = []
    for example in examples(root, *files):
        if not example.mark:
            found.append(
                f"{example.place}: say <!-- run -->, <!-- PATH -->, ... before the block (tests/house/docs.py)"
            )
        elif example.mark not in ("run", "sketch") and not _is_kept(example, root):
            found.append(f"{example.place}: differs from what is {example.mark}")
    return found


def _is_kept(example: Example, root: Path) -> bool:
    how, _, name = example.mark.rpartition(" ")
    text = (root / name).read_text() if (root / name).is_file() else ""
    return example.code in text if how == "in" else how == "" and text.strip() == example.code.strip()
