"""Rounds of jobs: every engine takes its turn in each round, each measure of it in a process of its own.

Why fresh processes: whatever an engine leaves behind (memory that has been touched already, an allocator's free
lists, threads, imported modules) makes the next measure of the same process quicker or slower, and "the first save"
exists only once in a process. Why by turns: other work on the machine comes and goes, and so meets all alike.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from benchmarks.engines import ENGINES
from benchmarks.job import Task
from benchmarks.limits import machine_facts
from benchmarks.places import Place
from benchmarks.processes import Clock, JobFailedError, command_line, run_job, wait_until_quiet
from benchmarks.states import Shape

__all__ = ["MEASURES", "JobFailedError", "Noise", "Progress", "Results", "Rounds", "Sample", "Settings", "run_job",
           "wait_until_quiet"]  # fmt: skip

FORMAT = 3
_Turn: TypeAlias = tuple[int, str, str, int, Shape]
MEASURES: tuple[str, ...] = ("limits", "save", "load", "cold", "reshard", "cached", "stall", "loop", "own")
"""In this order: "load", "cold" and "reshard" read what "save" has left."""
AFTER_SAVE = ("load", "cold", "reshard")
_ON_DISKS = ("cold", "cached", "loop")
"""Measures of folders only."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is to be measured; results of other settings are never mixed with it."""

    shapes: tuple[Shape, ...]
    ranks: tuple[int, ...]
    engines: tuple[str, ...]
    rounds: int
    saves: int
    steps: int = 40
    """Of the training loop of "loop"."""
    measures: tuple[str, ...] = MEASURES
    targets: tuple[int, ...] = ()
    """Numbers of ranks that load what another number of ranks has saved."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one job said. Only jobs that loaded what was saved are among them."""

    round: int
    engine: str
    state: str
    """The label of its shape."""
    ranks: int
    measure: str
    """Of `MEASURES`; "reshard to 4" says to how many ranks."""
    values: dict[str, Any]
    others: float
    """Processor cores that other programs used meanwhile, on average: the noise that this was measured in."""

    @property
    def key(self) -> tuple[int, str, str, int, str]:
        return (self.round, self.engine, self.state, self.ranks, self.measure)


@dataclass(frozen=True, slots=True)
class Noise:
    """What is done about other programs that run at the same time."""

    patience_s: float = 0.0
    """How long a job waits at most for the processors to be idle."""
    redo_above: float | None = None
    """Samples of an earlier run in whose time others used more cores than this are taken again."""


@dataclass(slots=True)
class Results:
    """Everything of one run of the command; this is the JSON file."""

    settings: Settings
    machine: dict[str, Any]
    command: str
    samples: list[Sample] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Engine -> why it did not take part."""
    failed: list[str] = field(default_factory=list)

    def encode(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def decode(cls, text: str) -> Results:
        """`ValueError` if it was not written by this version of the command."""
        content = json.loads(text)
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"these are not results of format {FORMAT}; measure again")
        return cls(**{**content, "settings": _settings(content["settings"]),
                      "samples": [Sample(**sample) for sample in content["samples"]]})  # fmt: skip


def _settings(content: Any) -> Settings:
    lists = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
    return Settings(**{**content, **lists, "shapes": tuple(Shape(**shape) for shape in content["shapes"])})


class Progress(Protocol):
    """Shows how far a run has come."""

    def begin(self, turns: int) -> None: ...

    def tell(self, text: str) -> None:
        """A line that stays."""

    def at(self, turn: int, text: str) -> None:
        """What is going on now."""


class Rounds:
    """One run of the command. Goes on from results of the same settings; `path` is rewritten after every job."""

    def __init__(self, settings: Settings, root: Place, path: Path | None, *, noise: Noise) -> None:
        self._root = root
        self._path = path
        self._noise = noise
        self.results = _continue(settings, path) or Results(settings, machine_facts(root), command_line())
        self.results.skipped = {
            engine: why for engine in settings.engines if (why := _why_skipped(engine, local=root.is_local))
        }
        if noise.redo_above is not None:
            self.results.samples = [s for s in self.results.samples if s.others <= noise.redo_above]

    def run(self, progress: Progress) -> Results:
        """All rounds. A job that fails is noted in the results and the others go on."""
        self.results.failed.clear()
        done = {sample.key for sample in self.results.samples}
        turns = list(self._turns())
        progress.begin(len(turns))
        for number, (turn, measures) in enumerate(turns):
            left = {measure for measure in measures if (*turn[:4], measure) not in done}
            if left:
                needed = left | ({"save"} if any(measure.startswith(AFTER_SAVE) for measure in left) else set())
                self._take_turn(turn, [measure for measure in measures if measure in needed], left, progress, number)
        progress.at(len(turns), "")
        return self.results

    def _turns(self) -> Iterator[tuple[_Turn, list[str]]]:
        """(round, engine, label, ranks, shape) with the measures it takes part in; the order shifts by round."""
        settings = self.results.settings
        engines = [engine for engine in settings.engines if engine not in self.results.skipped]
        for number in range(settings.rounds):
            start = number % max(len(engines), 1)
            order = [*engines[start:], *engines[:start]]
            for ranks in settings.ranks:
                for shape in settings.shapes:
                    for engine in ("limits", *order):
                        measures = list(self._measures_of(engine, ranks))
                        if measures:
                            yield (number, engine, shape.label, ranks, shape), measures

    def _measures_of(self, engine: str, ranks: int) -> Iterator[str]:
        settings = self.results.settings
        for measure in settings.measures:
            if not _takes_part(engine, measure) or (measure in _ON_DISKS and not self._root.is_local):
                continue
            if measure == "reshard":
                yield from (f"reshard to {target}" for target in settings.targets if target != ranks)
            else:
                yield measure

    def _take_turn(
        self, turn: _Turn, measures: Sequence[str], wanted: Collection[str], progress: Progress, at: int
    ) -> None:
        """Run these jobs one after the other; keep what those that are wanted say."""
        number, engine, state, ranks, _ = turn
        place, has_saved = self._root.fresh(), True
        try:
            for measure in measures:
                name = f"round {number + 1} | {ranks} rank{'s' * (ranks > 1)} | {state} | {engine} | {measure}"
                if measure.startswith(AFTER_SAVE) and not has_saved:
                    continue
                progress.at(at, name)
                wait_until_quiet(self._noise.patience_s)
                clock = Clock()
                try:
                    values = self._do(turn, measure, place)
                except JobFailedError as error:
                    has_saved = has_saved and measure != "save"
                    self.results.failed.append(f"{name}: {error}")
                    progress.tell(f"{name} FAILED\n{error}")
                    continue
                progress.tell(f"{name}: {clock.elapsed_s:.0f} s")
                if measure in wanted:
                    self._add(Sample(number, engine, state, ranks, measure, values, clock.others))
        finally:
            place.remove()

    def _do(self, turn: _Turn, measure: str, place: Place) -> dict[str, Any]:
        """One job, in a folder of its own unless it needs what "save" has left."""
        _, engine, _, ranks, shape = turn
        kept = measure == "save" or measure.startswith(AFTER_SAVE)
        within = place / ("kept" if kept else measure)
        within.make()
        kind, _, target = measure.partition(" to ")
        used = shape.shrunk() if measure == "own" else shape
        settings = self.results.settings
        task = Task(kind, engine, used, within.url, settings.saves, settings.steps)
        try:
            with tempfile.TemporaryDirectory(prefix="shardckpt-bench-job-") as folder:
                return run_job(task, int(target or ranks), Path(folder))
        finally:
            if not kept:
                within.remove()

    def _add(self, sample: Sample) -> None:
        self.results.samples = [s for s in self.results.samples if s.key != sample.key] + [sample]
        if self._path is not None:
            fresh = self._path.with_suffix(".tmp")
            fresh.write_text(self.results.encode())
            fresh.replace(self._path)


def _why_skipped(engine: str, *, local: bool) -> str:
    """Why it cannot take part; "" if it can."""
    entry = ENGINES[engine]
    if entry.missing:
        return f"needs the package {entry.missing}, which is not installed"
    return "" if local or entry.anywhere else "saves to folders only"


def _takes_part(engine: str, measure: str) -> bool:
    if engine == "limits":
        return measure == "limits"
    return measure in ENGINES[engine].measures


def _continue(settings: Settings, path: Path | None) -> Results | None:
    if path is None or not path.exists():
        return None
    results = Results.decode(path.read_text())
    if results.settings != settings:
        raise ValueError(f"{path} holds results of other settings; name another file or remove it")
    return results
