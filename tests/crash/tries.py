"""Trying states: each is judged, and a job goes on from each that differs in what that job can see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from shardckpt.run.catalog import Catalog
from shardckpt.testing.crash.judge import Finding, Remembering, in_memory, judge
from shardckpt.testing.crash.states import State
from tests.crash.acts import ROOT
from tests.crash.ours import delete_newest, recover, structure


@dataclass
class Tried:
    """What came of it."""

    states: int = 0
    recovered: int = 0
    """From how many of them a job went on: one of each kind."""
    findings: Counter[str] = field(default_factory=Counter)
    first: str = ""
    """The first finding, in words."""

    def note(self, state: State, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.findings[finding.kind] += 1
            self.first = self.first or f"after {state.prefix} operations: {finding}; there: {sorted(state.files)}"


def try_states(
    states: Iterable[State],
    reader: Remembering,
    *,
    recoveries: int,
    width: int = 600,
    told: tuple[type[Exception], ...] = (),
    stop: bool = False,
) -> Tried:
    """`recoveries`: at most so many times a job goes on. `stop`: at the first finding."""
    tried = Tried()
    kinds: set[object] = set()
    for state in states:
        tried.states += 1
        storage = in_memory(state.files, state.folders, below=ROOT)
        findings = judge(storage, state.allowed, reader, told=told)
        tried.note(state, findings)
        if not findings and not told and tried.recovered < recoveries:
            folders = [entry.folder for entry in Catalog(storage).entries()]
            kind = hash(structure(state.files, state.folders, folders))
            if kind not in kinds:
                kinds.add(kind)
                tried.recovered += 1
                tried.note(state, delete_newest(in_memory(state.files, state.folders, below=ROOT), reader))
                tried.note(state, recover(storage, state.allowed, reader, width=width))
        if stop and tried.findings:
            break
    return tried
