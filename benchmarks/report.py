"""From samples to tables: medians over rounds, the least and the most, and ratios against shardckpt and the machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks import cells
from benchmarks.cells import Spread
from benchmarks.limits import LIMITS, READ_LIMITS, REMOTE_LIMITS, WRITE_LIMITS
from benchmarks.rounds import Results, Sample

OURS = "shardckpt"


@dataclass(frozen=True, slots=True)
class Case:
    """The samples of one state on one number of ranks."""

    state: str
    label: str
    """The state with the size that was asked for."""
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
            samples = [s for s in results.samples if (s.state, s.ranks) == (shape.label, ranks)]
            if samples:
                found.append(Case(shape.name, shape.label, ranks, results.settings.engines, samples))
    return found


def render(results: Results) -> str:
    """Markdown."""
    lines = [_heading(results), ""]
    for case in cases(results):
        lines += [title(case), ""]
        for table in (_saves, _stalls, _loops, _loads, _reshards, _limits, _phases):
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
            engine, cells.seconds(seconds), cells.times(seconds, ours), cells.seconds(first), f"{rate / 1e9:.2f}",
            cells.share(rate, limit), cells.seconds(cached),
            cells.times(cached, case.spread(OURS, "cached", "seconds")),
            f"{written.middle / 1e6:.1f} in {files.middle:.0f}", cells.mb(peak), cells.milliseconds(own),
        ])  # fmt: skip
    return cells.table(
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
            cells.percent(case.spread(engine, "stall", "slowdown")),
            cells.mb(case.spread(engine, "stall", "peak_nbytes")),
        ]
        for engine in engines
    ]
    step = case.spread(engines[0], "stall", "step_s") if engines else None
    return cells.table(
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
    ratios = [cells.times(own, other) for own, other in zip(found, ours, strict=True)]
    return [*map(cells.milliseconds, found), " / ".join(ratios)]


def _loops(case: Case) -> list[str]:
    """One row for the bare saves, which were measured in the processes of all engines."""
    engines = case.taking_part("loop")
    rows = [
        [
            engine,
            str(case.of(engine, "loop")[0].values["synced"]),
            *_in_loops(case, [engine], ("plain_s", "saved_s"), cells.seconds),
            *_in_loops(case, [engine], ("over_plain", "over_bare"), cells.ratio),
            *_costs_in_loops(case, [engine], ""),
        ]
        for engine in engines
    ]
    if rows:
        totals = _in_loops(case, engines, ("plain_s", "bare_s"), cells.seconds)
        ratios = _in_loops(case, engines, ("bare_over_plain",), cells.ratio)
        rows.append(["bare copy and write", "all", *totals, *ratios, "1", *_costs_in_loops(case, engines, "bare_")])
    return cells.table(
        f"Training loop of {case.value('loop', 'steps')} steps, a save before every tenth",
        ["engine", "synced by itself", "without saves, s", "with saves, s", "over without", "over bare saves",
         "then until all is on the device, s", "stall of a save: first, ms", "steady, ms",
         "processor time of a save, ms", "MB of a save"],
        rows,
    )  # fmt: skip


def _costs_in_loops(case: Case, engines: Sequence[str], whose: str) -> list[str]:
    (end,) = _in_loops(case, engines, (f"{whose}end_s",), cells.seconds)
    spent = _in_loops(
        case, engines, (f"{whose}first_stall_s", f"{whose}stall_s", f"{whose}processor_s"), cells.milliseconds
    )
    return [end, *spent, *_in_loops(case, engines, (f"{whose}file_nbytes",), cells.mb)]


def _in_loops(
    case: Case, engines: Sequence[str], values: Sequence[str], cell: Callable[[Spread | None], str]
) -> list[str]:
    """Cells of values over the rounds of these engines taken together."""
    samples = [sample for engine in engines for sample in case.of(engine, "loop")]
    return [cell(Spread.of(_one(s.values[value]) for s in samples if value in s.values)) for value in values]


def _loads(case: Case) -> list[str]:
    nbytes = _any(case, "state_nbytes") or 0
    ours = {measure: case.spread(OURS, measure, "seconds") for measure in READ_LIMITS}
    rows = []
    for engine in case.taking_part("load"):
        row = [engine]
        for measure, limits in READ_LIMITS.items():
            seconds = case.spread(engine, measure, "seconds")
            rate = nbytes / seconds.middle if seconds else 0.0
            row += [cells.seconds(seconds), cells.times(seconds, ours[measure]), cells.share(rate, case.limit(*limits))]
        read = case.spread(engine, "cold", "read_nbytes")
        rows.append([*row, cells.over(read, nbytes), cells.mb(case.spread(engine, "load", "peak_nbytes"))])
    columns = ["engine", "warm", "against ours", "of the read limit", "cold", "against ours", "of the read limit",
               "bytes read / needed", "peak memory beyond the state, MB"]  # fmt: skip
    return cells.table("Load into the state, seconds", columns, rows)


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
            rows.append([
                engine, ranks, cells.seconds(seconds), cells.times(seconds, ours), relative, cells.over(read, nbytes)
            ])  # fmt: skip
    columns = ["engine", "ranks", "warm", "against ours", "speed against the same mesh", "bytes read / needed"]
    return cells.table("Load on another number of ranks, seconds", columns, rows)


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
    return cells.table("What the machine can do, GB/s", names, [row])


def _phases(case: Case) -> list[str]:
    """Where a save's time goes, as the engine itself reports it."""
    rows = []
    for measure in ("save", "stall", "loop"):
        samples = case.of(OURS, measure)
        if samples:
            ranks = [sample.values["phases"] for sample in samples]
            names = list(ranks[0][0])
            spreads = [Spread.of(max(of_rank[name] for of_rank in every) for every in ranks) for name in names]
            rows.append([f"last {measure}", *map(cells.seconds, spreads)])
    names = ["stall", "stage", "write", "commit", "total"]
    return cells.table("What shardckpt reports of its save, seconds of the slowest rank", ["", *names], rows)


def _any(case: Case, value: str) -> Any:
    return next((case.value(m, value) for m in ("save", "stall", "loop", "load", "cold") if case.value(m, value)), None)


def _one(value: float | Sequence[float]) -> float:
    return float(value) if isinstance(value, (int, float)) else median(value)
