"""What a load is about: keys of the state that are included, and by which names the checkpoint has them. Pure.

A checkpoint is seen through a selection as a record that has the state's names, and only what is selected. So whoever
compares and plans knows of one kind of names; the checkpoint's own are asked for where a file is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from shardckpt.engine.loading.selecting.names import Patterns, Rule, by_precision
from shardckpt.format.checksum import value_digest
from shardckpt.format.manifest import Manifest, Table

NOT_SELECTED = "not included, or excluded"
"""Why something of a state is left as it is."""

Said: TypeAlias = Mapping[str, Any]
"""What a rank tells of its selection (JSON)."""


class Selection:
    """Of one policy. All ranks of a job have the same."""

    def __init__(
        self,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        rename: Mapping[str, str] | None = None,
        *,
        numbers: Mapping[str, str] | None = None,
    ) -> None:
        """`numbers`: names of the state, and of all that lies below, that the checkpoint knows by these (see
        `numbered`). They count before what `rename` says."""
        self._include, self._exclude = Patterns(include), Patterns(exclude)
        self._rules = by_precision(Rule(own, saved) for own, saved in (rename or {}).items())
        self._numbers = dict(numbers or {})
        self._numbered = {saved: own for own, saved in self._numbers.items()}
        self._saved_names: dict[str, str] = {}

    @property
    def is_partial(self) -> bool:
        """Whether anything may be left out."""
        return bool(self._include.texts or self._exclude.texts)

    @property
    def renames(self) -> bool:
        return bool(self._rules or self._numbers)

    def takes(self, name: str) -> bool:
        """Whether a key of the state is selected."""
        if self._include.texts and not self._include.matching(name):
            return False
        return not (self._exclude.texts and self._exclude.matching(name))

    def saved_name(self, name: str) -> str:
        """What the checkpoint calls a key of the state."""
        if not self.renames:
            return name
        if name not in self._saved_names:
            self._saved_names[name] = _through(self._numbers, name) or self.renamed(name)
        return self._saved_names[name]

    def renamed(self, name: str) -> str:
        """The same by the rules alone, whatever has a number."""
        number = self._applied(name)
        saved = None if number is None else self._rules[number].forwards(name)
        return name if saved is None else saved

    def _applied(self, name: str) -> int | None:
        """The number of the rule for this name."""
        return next((number for number, rule in enumerate(self._rules) if rule.forwards(name) is not None), None)

    def own_names(self, saved: str) -> list[str]:
        """The keys of a state, selected or not, that are loaded from this key of a checkpoint: none, one or several."""
        numbered = _through(self._numbered, saved)
        if numbered is not None:
            return [numbered]
        candidates = (*(rule.backwards(saved) for rule in self._rules), saved)
        return [name for name in dict.fromkeys(candidates) if name is not None and self.saved_name(name) == saved]

    def called(self, name: str) -> str:
        """What a person is told of a key of the state: the checkpoint's name, if that is another, and its own."""
        saved = self.saved_name(name)
        return name if saved == name else f"{saved} ({name} in the state)"

    def view(self, manifest: Manifest) -> View:
        """The record as the state's names have it."""
        if not self.is_partial and not self.renames:
            return View(manifest, self)
        passed_over: set[str] = set()
        known: dict[str, list[str]] = {}

        def own(saved: str) -> list[str]:
            if saved not in known:
                names = self.own_names(saved)
                known[saved] = [name for name in names if self.takes(name)]
                passed_over.update(set(names).difference(known[saved]))
            return known[saved]

        tables = tuple(_seen(table, own) for table in manifest.tables)
        differ = tuple(name for saved in manifest.differ for name in own(saved))
        return View(replace(manifest, tables=tables, differ=differ), self, frozenset(passed_over))

    def say(
        self, keys: Callable[[], Collection[str]], manifest: Manifest, above: Callable[[], Collection[str]] = tuple
    ) -> Said:
        """What this rank has to tell: what its patterns and rules are, and which of them match a key of its state.

        `keys` gives those, `above` further names that rules may be for, below which there may be no key: parameters of
        optimizers that have no state. Neither is called if all is taken by its own name.
        """
        texts = [self._include.texts, self._exclude.texts, sorted((rule.own, rule.saved) for rule in self._rules)]
        said: dict[str, Any] = {"digest": value_digest(texts), "numbers": value_digest(sorted(self._numbers.items()))}
        if not self.is_partial and not self.renames:
            return said
        names = keys()
        known = (*names, *above()) if self.renames else names
        saved = {key for table in manifest.tables for key in (*table.tensors, *table.values)}
        outside = [name for key in saved for name in self.own_names(key)]
        said["include"] = _matched(self._include, names)
        said["exclude"] = _matched(self._exclude, [*names, *outside])
        said["rename"] = sorted({n for n, rule in enumerate(self._rules) if any(map(rule.forwards, known))})
        applied = [(name, n) for name in names if self.takes(name) and (n := self._applied(name)) is not None]
        said["applied"] = sorted({n for _, n in applied})
        said["found"] = sorted({n for name, n in applied if self.saved_name(name) in saved})
        said["takes"] = any(map(self.takes, names))
        return said

    def problems(self, said: Sequence[Said]) -> list[str]:
        """What is wrong with the selection of a job, from what all ranks said. On rank 0."""
        other = next((rank for rank, own in enumerate(said) if own["digest"] != said[0]["digest"]), None)
        if other is not None:
            return [f"policy: include, exclude and rename are others on rank {other} than on rank 0; give all the same"]
        other = next((rank for rank, own in enumerate(said) if own["numbers"] != said[0]["numbers"]), None)
        if other is not None:
            return [f"policy: rank {other} numbers the parameters of an optimizer otherwise than rank 0 (by_number)"]
        if not self.is_partial and not self.renames:
            return []
        matched = {
            what: {n for own in said for n in own[what]}
            for what in ("include", "exclude", "rename", "applied", "found")
        }
        told = [
            f"{what}: {text!r} matches no key of the state{also}"
            for what, patterns, also in (
                ("include", self._include, ""),
                ("exclude", self._exclude, ", and none of the checkpoint"),
            )
            for number, text in enumerate(patterns.texts)
            if number not in matched[what]
        ]
        for number, rule in enumerate(self._rules):
            if number not in matched["rename"]:
                told.append(f"rename: {rule.own!r} (to {rule.saved!r}) matches no key of the state")
            elif number in matched["applied"] - matched["found"]:
                told.append(f"rename: {rule.own!r} is in the state, but {rule.saved!r} is not in the checkpoint")
        if not told and not any(own["takes"] for own in said):
            told.append("include, exclude: together they leave nothing of the state to be loaded")
        return told


@dataclass(frozen=True, slots=True)
class View:
    """A record seen through a selection."""

    manifest: Manifest
    """By the state's names, and with nothing but what is selected."""
    selection: Selection = field(default_factory=Selection)
    passed_over: frozenset[str] = field(default_factory=frozenset)
    """The state's names of what is not selected."""


def _through(table: Mapping[str, str], name: str) -> str | None:
    """The name with what stands for its beginning, up to some dot; None if nothing does."""
    above = name if table else ""
    while above:
        if above in table:
            return table[above] + name[len(above) :]
        above = above.rpartition(".")[0]
    return None


def _seen(table: Table, own: Callable[[str], Sequence[str]]) -> Table:
    tensors = {name: entry for saved, entry in table.tensors.items() for name in own(saved)}
    return Table(table.ranks, tensors, {name: home for saved, home in table.values.items() for name in own(saved)})


def _matched(patterns: Patterns, names: Collection[str]) -> list[int]:
    return sorted({number for name in names for number in patterns.matching(name)})
