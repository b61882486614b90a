"""Patterns for the keys of a state, and rules that give a key another name. Pure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest


class Patterns:
    """Shell patterns (`fnmatch`) for flat names. A pattern that matches a name matches all that lies below it, too:
    "model.layers.3" is that whole layer, and "*.bias" every bias."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.texts = tuple(patterns)
        self._matchers = [re.compile(fnmatch.translate(text)).match for text in self.texts]
        self._known: dict[str, frozenset[int]] = {"": frozenset()}

    def matching(self, name: str) -> frozenset[int]:
        """The numbers of the patterns that match this name."""
        known, above, left = self._known, name, list[str]()
        while above not in known:
            left.append(above)
            above = above.rpartition(".")[0]
        found = known[above]
        for below in reversed(left):
            own = {number for number, matches in enumerate(self._matchers) if matches(below)}
            found = known[below] = found | own if own else found
        return found


class _Form:
    """One side of a rule: a name in which each `*` stands for any text without dots, and what lies below such names."""

    def __init__(self, text: str) -> None:
        self._pieces = text.split("*")
        self._match = re.compile("([^.]*)".join(map(re.escape, self._pieces)) + r"(\..*)?", re.DOTALL).fullmatch

    def read(self, name: str) -> tuple[str, ...] | None:
        """What the stars stand for in this name, and what comes behind; None if it is not of this form."""
        match = self._match(name)
        return match.groups("") if match else None

    def write(self, filled: Sequence[str]) -> str:
        return "".join(part for pair in zip_longest(self._pieces, filled, fillvalue="") for part in pair)


class Rule:
    """A name of the state, or of all that lies below it, and the name that the checkpoint has for it."""

    def __init__(self, own: str, saved: str) -> None:
        if not own or not saved or own.count("*") != saved.count("*"):
            raise ValueError(
                f"rename {own!r} to {saved!r}: give a name for a name, with as many * on the one side as on the other"
            )
        self.own, self.saved = own, saved
        self._own, self._saved = _Form(own), _Form(saved)

    def forwards(self, name: str) -> str | None:
        """From the state's name to the checkpoint's; None if the rule says nothing of this name."""
        filled = self._own.read(name)
        return self._saved.write(filled) if filled is not None else None

    def backwards(self, saved: str) -> str | None:
        filled = self._saved.read(saved)
        return self._own.write(filled) if filled is not None else None


def by_precision(rules: Iterable[Rule]) -> list[Rule]:
    """In the order in which they are asked: those first that say most of a name."""
    return sorted(rules, key=lambda rule: (-rule.own.count("."), -len(rule.own)))
