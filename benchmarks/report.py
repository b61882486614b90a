"""From samples to tables: medians over rounds, the least and the most, and ratios against shardckpt and the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.limits import LIMITS, READ_LIMITS, REMOTE_LIMITS, WRITE_LIMITS
from benchmarks.rounds import Results, Sample

OURS = "shardckpt"


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over the rounds, each round counted once."""

    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread | None:
        """None if there are no numbers."""
        found = sorted(numbers)
        return cls(median(found), found[0], found[-1]) if found else None


@dataclass(frozen=True, slots=True)
class Case:
    """The samples of one state on one number of ranks."""

    state: str
    ranks: int
    engines: Sequence[str]
    samples: Sequence[Sample]

    def spread(self, engine: str, measure: str, value: str) -> Spread | None:
        """Of a value over the rounds; of a list of values, its median counts for the round."""
        return Spread.of(_one(s.values[value]) for s in self.of(engine, measure) if value in s.values)

    def of(self, engine: str, measure: str) -> list[Sample]:
        return [s for s in self.samples if (s.engine, s.measure) == (engine, measure)]

    def taking_part(self, measure: str) -> list[str]:
        return [engine for engine in self.engines if self.of(engine, measure)]

    def limit(self, *names: str) -> float | None:
        """The best of these limits of the machine, in bytes per second."""
        found = [spread.middle for name in names if (spread := self.spread("limits", "limits", name))]
        return max(found, default=None)

    def value(self, measure: str, value: str) -> Any:
        """What is the same in all samples of the measure."""
        return next((s.values[value] for s in self.samples if s.measure == measure and value in s.values), None)


def cases(results: Results) -> list[Case]:
    """In the order of the settings; those without a sample left out."""
    found = []
    for ranks in results.settings.ranks:
        for shape in results.settings.shapes:
            samples = [s for s in results.samples if (s.state, s.ranks) == (shape.name, ranks)]
            if samples:
                found.append(Case(shape.name, ranks, results.settings.engines, samples))
    return found


def render(results: Results) -> str:
    """Markdown."""
    lines = [_heading(results), ""]
    for case in cases(results):
        lines += [title(case), ""]
        for table in (_saves, _stalls, _loads, _reshards, _limits, _phases):
            lines += [*table(case), ""]
    lines += [f"- {engine} was skipped: it {why}" for engine, why in results.skipped.items()]
    lines += [f"- FAILED: {failure}" for failure in results.failed]
    return "\n".join(lines).rstrip() + "\n"


def _heading(results: Results) -> str:
    facts = results.machine
    others = Spread.of(sample.others for sample in results.samples)
    noise = (
        f"; others used {others.middle:.1f} ({others.least:.1f}-{others.most:.1f}) cores meanwhile" if others else ""
    )
    return (
        f"{facts['date']}, {facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB, kernel "
        f"{facts['kernel']}, {facts['file system']}, Python {facts['python']}, torch "
        f"{facts['torch']}, shardckpt {facts['shardckpt']}{noise}\n\n"
        f"    {results.command}"
    )


def title(case: Case) -> str:
    """What was saved, and by how many."""
    nbytes, tensors = (_any(case, value) for value in ("state_nbytes", "tensors"))
    size = f", {nbytes / 1e9:.2f} GB in {tensors} tensors" if nbytes else ""
    rounds = len({sample.round for sample in case.samples})
    return f"### State {case.state}{size}, {case.ranks} rank{'s' * (case.ranks > 1)}, {rounds} rounds"


def _saves(case: Case) -> list[str]:
    engines = case.taking_part("save")
    ours = case.spread(OURS, "save", "seconds")
    limit = case.limit(*WRITE_LIMITS)
    rows = []
    for engine in engines:
        seconds, first = case.spread(engine, "save", "seconds"), case.spread(engine, "save", "first_s")
        cached = case.spread(engine, "cached", "seconds")
        written, peak = (case.spread(engine, "save", value) for value in ("file_nbytes", "peak_nbytes"))
        own, files = case.spread(engine, "own", "seconds"), case.spread(engine, "save", "files")
        if seconds is None or written is None or files is None:  # one sample holds all of them
            continue
        rate = written.middle / seconds.middle
        rows.append([
            engine, _seconds(seconds), _times(seconds, ours), _seconds(first), f"{rate / 1e9:.2f}", _share(rate, limit),
            _seconds(cached), _times(cached, case.spread(OURS, "cached", "seconds")),
            f"{written.middle / 1e6:.1f} in {files.middle:.0f}", _mb(peak), _milliseconds(own),
        ])  # fmt: skip
    return _table(
        "Save, seconds",
        ["engine", "durable, steady", "against ours", "first", "GB/s", "of the write limit",
         "not synced", "against ours", "MB in files", "peak memory beyond the state, MB", "own processor time, ms"],
        rows,
    )  # fmt: skip


def _stalls(case: Case) -> list[str]:
    engines = case.taking_part("stall")
    rows = [
        [
            engine,
            *_first_and_steady(case, engine, "blocked_s"),
            *_first_and_steady(case, engine, "stall_s"),
            *_first_and_steady(case, engine, "lost_s"),
            _percent(case.spread(engine, "stall", "slowdown")),
            _mb(case.spread(engine, "stall", "peak_nbytes")),
        ]
        for engine in engines
    ]
    step = case.spread(engines[0], "stall", "step_s") if engines else None
    return _table(
        "Save while training goes on, milliseconds"
        + (f" (a training step without a save: {step.middle * 1e3:.0f})" if step and step.middle > 1e-3 else ""),
        ["engine", "the call blocks: first", "steady", "against ours, first / steady",
         "call + wait before the optimizer step: first", "steady", "against ours, first / steady",
         "lost until it is saved: first", "steady", "against ours, first / steady", "slowdown meanwhile",
         "peak memory beyond the state, MB"],
        rows,
    )  # fmt: skip


def _first_and_steady(case: Case, engine: str, value: str) -> list[str]:
    found = [case.spread(engine, "stall", name) for name in (f"first_{value}", value)]
    ours = [case.spread(OURS, "stall", name) for name in (f"first_{value}", value)]
    ratios = [_times(own, other) for own, other in zip(found, ours, strict=True)]
    return [*map(_milliseconds, found), " / ".join(ratios)]


def _loads(case: Case) -> list[str]:
    nbytes = _any(case, "state_nbytes") or 0
    ours = {measure: case.spread(OURS, measure, "seconds") for measure in READ_LIMITS}
    rows = []
    for engine in case.taking_part("load"):
        row = [engine]
        for measure, limits in READ_LIMITS.items():
            seconds = case.spread(engine, measure, "seconds")
            rate = nbytes / seconds.middle if seconds else 0.0
            row += [_seconds(seconds), _times(seconds, ours[measure]), _share(rate, case.limit(*limits))]
        read = case.spread(engine, "cold", "read_nbytes")
        rows.append([*row, _over(read, nbytes), _mb(case.spread(engine, "load", "peak_nbytes"))])
    columns = ["engine", "warm", "against ours", "of the read limit", "cold", "against ours", "of the read limit",
               "bytes read / needed", "peak memory beyond the state, MB"]  # fmt: skip
    return _table("Load into the state, seconds", columns, rows)


def _reshards(case: Case) -> list[str]:
    rows = []
    for measure in dict.fromkeys(s.measure for s in case.samples if s.measure.startswith("reshard")):
        ours = case.spread(OURS, measure, "seconds")
        for engine in case.taking_part(measure):
            seconds, same = case.spread(engine, measure, "seconds"), case.spread(engine, "load", "seconds")
            nbytes = case.of(engine, measure)[0].values["state_nbytes"]
            read = case.spread(engine, measure, "read_nbytes")
            relative = f"{same.middle / seconds.middle:.2f} x" if same and seconds else ""
            ranks = f"{case.ranks} to {measure.removeprefix('reshard to ')}"
            rows.append([engine, ranks, _seconds(seconds), _times(seconds, ours), relative, _over(read, nbytes)])
    columns = ["engine", "ranks", "warm", "against ours", "speed against the same mesh", "bytes read / needed"]
    return _table("Load on another number of ranks, seconds", columns, rows)


def _limits(case: Case) -> list[str]:
    if not case.of("limits", "limits"):
        return []
    row = []
    measured = case.of("limits", "limits")[0].values
    names = [name for name in dict.fromkeys((*LIMITS, *REMOTE_LIMITS)) if name in measured]
    for name in names:
        spread = case.spread("limits", "limits", name)
        assert spread is not None
        row.append(f"{spread.middle / 1e9:.2f} ({spread.least / 1e9:.2f}-{spread.most / 1e9:.2f})")
    return _table("What the machine can do, GB/s", names, [row])


def _phases(case: Case) -> list[str]:
    """Where a save's time goes, as the engine itself reports it."""
    rows = []
    for measure in ("save", "stall"):
        samples = case.of(OURS, measure)
        if samples:
            ranks = [sample.values["phases"] for sample in samples]
            names = list(ranks[0][0])
            spreads = [Spread.of(max(of_rank[name] for of_rank in every) for every in ranks) for name in names]
            rows.append([f"last {measure}", *map(_seconds, spreads)])
    names = ["stall", "stage", "write", "commit", "total"]
    return _table("What shardckpt reports of its save, seconds of the slowest rank", ["", *names], rows)


def _table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns in which nothing stands are left out."""
    if not rows:
        return []
    filled = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return [f"**{heading}**", "", *(f"| {' | '.join(line[number] for number in filled)} |" for line in lines)]


def _any(case: Case, value: str) -> Any:
    return next((case.value(m, value) for m in ("save", "stall", "load", "cold") if case.value(m, value)), None)


def _one(value: float | Sequence[float]) -> float:
    return float(value) if isinstance(value, (int, float)) else median(value)


def _formatted(write: Callable[[float], str]) -> Callable[[Spread | None], str]:
    def cell(spread: Spread | None) -> str:
        if spread is None:
            return ""
        return f"{write(spread.middle)} ({write(spread.least)}-{write(spread.most)})"

    return cell


_seconds = _formatted(lambda seconds: f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.3f}")
_milliseconds = _formatted(lambda seconds: f"{seconds * 1e3:.0f}" if abs(seconds) >= 0.01 else f"{seconds * 1e3:.1f}")


def _percent(spread: Spread | None) -> str:
    return f"{spread.middle:.0%} ({spread.least:.0%}-{spread.most:.0%})" if spread else ""


def _over(read: Spread | None, needed: int) -> str:
    return f"{read.middle / needed:.2f}" if read and needed else ""


def _mb(spread: Spread | None) -> str:
    return f"{spread.middle / 1e6:.0f}" if spread else ""


def _times(spread: Spread | None, ours: Spread | None) -> str:
    if spread is None or ours is None or min(spread.middle, ours.middle) <= 0:
        return ""  # a loss that drowns in the noise is none
    return f"{spread.middle / ours.middle:.1f} x" if spread is not ours and spread != ours else "1"


def _share(rate: float, limit: float | None) -> str:
    return f"{rate / limit:.0%}" if limit and rate else ""
