"""Rounds of jobs: every engine takes its turn in each round, each measure of it in a process of its own.

Why fresh processes: whatever an engine leaves behind (memory that has been touched already, an allocator's free
lists, threads, imported modules) makes the next measure of the same process quicker or slower, and "the first save"
exists only once in a process. Why by turns: other work on the machine comes and goes, and so meets all alike.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.engines import ENGINES
from benchmarks.job import Measure, Task
from benchmarks.limits import machine_facts
from benchmarks.states import Shape

FORMAT = 1
_DEADLINE_S = 900.0
"""For one job: whatever hangs must not hang the others."""
_Turn: TypeAlias = tuple[int, str, str, int, Shape]
MEASURES: tuple[Measure, ...] = ("limits", "save", "load", "cold", "stall", "own")
"""In this order: "load" and "cold" read what "save" has left."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is to be measured; results of other settings are never mixed with it."""

    shapes: tuple[Shape, ...]
    ranks: tuple[int, ...]
    engines: tuple[str, ...]
    rounds: int
    saves: int
    measures: tuple[Measure, ...] = MEASURES


@dataclass(frozen=True, slots=True)
class Sample:
    """What one job said. Only jobs that loaded what was saved are among them."""

    round: int
    engine: str
    state: str
    ranks: int
    measure: Measure
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


class JobFailedError(Exception):
    """A job ended without a result; the message holds the end of what it printed."""


class Rounds:
    """One run of the command. Goes on from results of the same settings; `path` is rewritten after every job."""

    def __init__(self, settings: Settings, root: Path, path: Path | None, *, noise: Noise) -> None:
        self._root = root
        self._path = path
        self._noise = noise
        self.results = _continue(settings, path) or Results(settings, machine_facts(root), _command())
        self.results.skipped = {
            engine: f"needs the package {missing}, which is not installed"
            for engine in settings.engines
            if (missing := ENGINES[engine].missing)
        }
        if noise.redo_above is not None:
            self.results.samples = [s for s in self.results.samples if s.others <= noise.redo_above]

    def run(self) -> Results:
        """All rounds. A job that fails is noted in the results and the others go on."""
        self.results.failed.clear()
        done = {sample.key for sample in self.results.samples}
        turns = list(self._turns())
        began, ran = time.monotonic(), 0
        for number, (turn, measures) in enumerate(turns):
            left = {measure for measure in measures if (*turn[:4], measure) not in done}
            if left:
                needed = left | ({"save"} if left & {"load", "cold"} else set())
                self._take_turn(turn, [measure for measure in measures if measure in needed], left)
                ran += 1
                rest = (time.monotonic() - began) / ran * (len(turns) - number - 1)
                print(
                    f"  {number + 1}/{len(turns)} turns, about {rest / 60:.0f} min to go", file=sys.stderr, flush=True
                )
        return self.results

    def _turns(self) -> Iterator[tuple[_Turn, list[Measure]]]:
        """(round, engine, state, ranks, shape) with the measures it takes part in; the order shifts by round."""
        settings = self.results.settings
        engines = [engine for engine in settings.engines if engine not in self.results.skipped]
        for number in range(settings.rounds):
            start = number % max(len(engines), 1)
            order = [*engines[start:], *engines[:start]]
            for ranks in settings.ranks:
                for shape in settings.shapes:
                    for engine in ("limits", *order):
                        measures = [measure for measure in settings.measures if _takes_part(engine, measure)]
                        if measures:
                            yield (number, engine, shape.name, ranks, shape), measures

    def _take_turn(self, turn: _Turn, measures: Sequence[Measure], wanted: Collection[Measure]) -> None:
        """Run these jobs one after the other; keep what those that are wanted say."""
        number, engine, state, ranks, shape = turn
        folder = Path(tempfile.mkdtemp(prefix="shardckpt-bench-", dir=self._root))
        try:
            for measure in measures:
                own = measure in ("stall", "own")
                used = shape.shrunk() if measure == "own" else shape
                place = folder / (measure if own else "kept")
                place.mkdir(exist_ok=True)
                task = Task(measure, engine, used, str(place), self.results.settings.saves)
                name = f"round {number + 1} | {ranks} rank{'s' * (ranks > 1)} | {state} | {engine} | {measure}"
                wait_until_quiet(self._noise.patience_s)
                clock = _Clock()
                try:
                    values = run_job(task, ranks, folder)
                except JobFailedError as error:
                    self.results.failed.append(f"{name}: {error}")
                    print(f"{name} FAILED\n{error}", file=sys.stderr, flush=True)
                    break
                print(f"{name}: {clock.elapsed_s:.0f} s", file=sys.stderr, flush=True)
                if measure in wanted:
                    self._add(Sample(number, engine, state, ranks, measure, values, clock.others))
                if own:
                    shutil.rmtree(place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()  # so that nobody measures the end of what was measured before

    def _add(self, sample: Sample) -> None:
        self.results.samples = [s for s in self.results.samples if s.key != sample.key] + [sample]
        if self._path is not None:
            fresh = self._path.with_suffix(".tmp")
            fresh.write_text(self.results.encode())
            fresh.replace(self._path)


def _takes_part(engine: str, measure: Measure) -> bool:
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


def run_job(task: Task, ranks: int, folder: Path) -> dict[str, Any]:
    """Start the ranks, wait for them, and give what rank 0 found out."""
    file, log, result = folder / "task.json", folder / "log", folder / "result.json"
    file.write_text(task.encode())
    result.unlink(missing_ok=True)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *start, "-m", "benchmarks.job", str(file)]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=_environment()
        )
        status: int | str
        try:
            status = process.wait(_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            status = f"none within {_DEADLINE_S:.0f} s"
        except BaseException:
            process.terminate()  # torchrun then ends its ranks; killed, it would leave them behind
            process.wait()
            raise
    if status or not result.exists():
        raise JobFailedError(f"exit status {status}\n{log.read_text(errors='replace')[-3000:]}")
    values: dict[str, Any] = json.loads(result.read_text())
    return values


def _environment() -> dict[str, str]:
    """Ours, with this package to be found from anywhere."""
    here = str(Path(__file__).resolve().parent.parent)
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _command() -> str:
    return "python -m benchmarks " + " ".join(f'"{word}"' if " " in word else word for word in sys.argv[1:])


class _Clock:
    """Starts when made; tells how long ago that was, and how much others have made of the processors since."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy_s(), _own_s()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def others(self) -> float:
        """Cores, on average. What our children used counts as ours once they have ended."""
        return max(0.0, (_busy_s() - self._busy) - (_own_s() - self._own)) / max(self.elapsed_s, 0.01)


def wait_until_quiet(patience_s: float) -> None:
    """Return when other programs use less than a third of one core for two seconds, or patience is at an end."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        clock = _Clock()
        time.sleep(2)
        if clock.others < 0.33:
            return


def _busy_s() -> float:
    """Seconds that all processors together have worked since the machine started (user, nice, system, irq, steal)."""
    fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields)) - idle) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in own)
