"""What the engine is to reach: ratios within one run, and how far each was reached. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from benchmarks.cells import Spread
from benchmarks.limits import READ_LIMITS, WRITE_LIMITS
from benchmarks.report import OURS, Case

_DCP_SAVES = ("dcp.save", "dcp.save, 2 threads")
_ASYNC_PEERS = ("dcp.async_save", "torch_checkpointing, async")
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Goal:
    """One number, what it is to be, and whether more of it is better."""

    what: str
    reached: float
    aim: float
    more: bool = True
    unit: str = " x"

    @property
    def is_met(self) -> bool:
        return self.reached >= self.aim if self.more else self.reached <= self.aim


def goals_of(case: Case) -> list[Goal]:
    """Those for which there are numbers."""
    return [*_saves(case), *_cached(case), *_stalls(case), *_loop(case), *_loads(case), *_reshards(case), *_costs(case)]


def render_goals(cases: Sequence[Case]) -> str:
    """Markdown: one table for all states and numbers of ranks."""
    lines = ["| state, ranks | measure | is | to be | |", "| --- | --- | ---: | ---: | --- |"]
    goals = [(case, goal) for case in cases for goal in goals_of(case)]
    for case, goal in [*goals, *_growth(cases)]:
        least = "at least" if goal.more else "at most"
        is_, aim = (f"{number:.3g}{goal.unit}" for number in (goal.reached, goal.aim))
        verdict = "yes" if goal.is_met else "**no**"
        lines.append(f"| {case.label}, {case.ranks} | {goal.what} | {is_} | {least} {aim} | {verdict} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _saves(case: Case) -> Iterator[Goal]:
    ours, nbytes = case.spread(OURS, "save", "seconds"), _nbytes(case)
    if ours is None:
        return
    limit = case.limit(*WRITE_LIMITS)
    fastest = _best(case, "save", case.engines)
    if limit and nbytes and fastest:
        # A method that an engine has found counts as well: the limits are measured with a few only.
        yield Goal(
            "durable save against the best durable write", nbytes / ours.middle / max(limit, nbytes / fastest), 0.85
        )
    shipped, best = case.spread("dcp.save", "save", "seconds"), _best(case, "save", _DCP_SAVES)
    alone = case.ranks == 1
    if shipped and case.state == "A":
        yield Goal("durable save against dcp.save as shipped", shipped.middle / ours.middle, 2.5 if alone else 1.9)
    if best and case.state == "A":
        yield Goal("durable save against dcp.save at its best", best / ours.middle, 1.5 if alone else 1.4)


def _cached(case: Case) -> Iterator[Goal]:
    ours, aims = case.spread(OURS, "cached", "seconds"), {"A": (5.0, None, None), "B": (15.0, 10.0, 3.0)}
    if ours is None or case.state not in aims or case.ranks > 1:
        return
    peers = (
        ("dcp.save as shipped", case.spread("dcp.save", "cached", "seconds")),
        ("dcp.save at its best", _as_spread(_best(case, "cached", _DCP_SAVES))),
        ("torch.save", case.spread("torch.save", "cached", "seconds")),
    )
    for (peer, theirs), aim in zip(peers, aims[case.state], strict=True):
        if theirs and aim:
            yield Goal(f"save without a sync against {peer}", theirs.middle / ours.middle, aim)


def _stalls(case: Case) -> Iterator[Goal]:
    peers = [engine for engine in case.engines if engine.startswith(_ASYNC_PEERS)]
    ours, theirs = case.spread(OURS, "stall", "stall_s"), _best(case, "stall", peers, "stall_s")
    if ours and theirs:
        yield Goal("steady stall against the best peer's", theirs / ours.middle, 20.0)
    slowed = case.spread(OURS, "stall", "lost_s")
    shipped = case.spread("dcp.async_save, thread", "stall", "lost_s")
    if slowed and shipped and case.state == "A" and shipped.middle > 0:
        yield Goal(
            "training time lost to a save against dcp.async_save", slowed.middle / shipped.middle, 1 / 3, more=False
        )


def _loop(case: Case) -> Iterator[Goal]:
    ours = case.spread(OURS, "loop", "over_bare")
    if ours and case.state == "A":
        what = "training loop with saves, over the loop without them plus the device's share"
        yield Goal(what, ours.middle, 1.03, more=False)


def _growth(cases: Sequence[Case]) -> Iterator[tuple[Case, Goal]]:
    """What must not grow with the bytes: the largest A against the smallest on as many ranks."""
    for ranks, measure in product(dict.fromkeys(case.ranks for case in cases), ("stall", "loop")):
        found = {
            _nbytes(case): (case, spread)
            for case in cases
            if case.state == "A" and case.ranks == ranks and (spread := case.spread(OURS, measure, "stall_s"))
        }
        if len(found) > 1:
            (small, before), (large, after) = found[min(found)], found[max(found)]
            what = f"steady stall{' in a training loop' * (measure == 'loop')}, against that of {small.label}"
            yield large, Goal(what, after.middle / before.middle, 1.5, more=False)


def _loads(case: Case) -> Iterator[Goal]:
    nbytes = _nbytes(case)
    for (measure, aim, name), (engine, how) in product(
        (("load", 0.8, "warm"), ("cold", 0.85, "cold")), ((OURS, "checked first"), (f"{OURS}, in place", "in place"))
    ):
        ours, limit = case.spread(engine, measure, "seconds"), case.limit(*READ_LIMITS[measure])
        theirs = case.spread("dcp.save", measure, "seconds")
        if ours and limit and case.state == "A":
            yield Goal(f"{name} load, {how}, against the read limit", nbytes / ours.middle / limit, aim)
        if ours and theirs and case.state == "A":
            yield Goal(f"{name} load, {how}, against dcp.load", theirs.middle / ours.middle, 3.0)


def _reshards(case: Case) -> Iterator[Goal]:
    same = case.spread(OURS, "load", "seconds")
    for measure in dict.fromkeys(s.measure for s in case.samples if s.measure.startswith("reshard")):
        ours, ranks = case.spread(OURS, measure, "seconds"), measure.removeprefix("reshard to ")
        read = case.spread(OURS, measure, "read_nbytes")
        if ours is None or read is None:
            continue
        needed = case.of(OURS, measure)[0].values["state_nbytes"]
        if same:
            yield Goal(f"load on {ranks} ranks against a load on {case.ranks}", same.middle / ours.middle, 0.8)
        yield Goal(f"bytes read over bytes needed, on {ranks} ranks", read.middle / needed, 1.02, more=False, unit="")


def _costs(case: Case) -> Iterator[Goal]:
    nbytes, own = _nbytes(case), case.spread(OURS, "own", "seconds")
    for measure in ("save", "stall"):
        peak = case.spread(OURS, measure, "peak_nbytes")
        if peak and nbytes:
            aim = (1.05 * nbytes + 64 * _MIB * case.ranks) / 1e6
            what = f"peak memory beyond the state, {'durable' if measure == 'save' else 'asynchronous'} save"
            yield Goal(what, peak.middle / 1e6, aim, more=False, unit=" MB")
    aims = {"A": 15.0, "B": 150.0}
    if own and case.state in aims:
        yield Goal(
            "the engine's own processor time for a save", own.middle * 1e3, aims[case.state], more=False, unit=" ms"
        )


def _best(case: Case, measure: str, engines: Sequence[str], value: str = "seconds") -> float | None:
    """The least median of these engines."""
    found = [spread.middle for engine in engines if (spread := case.spread(engine, measure, value))]
    return min(found, default=None)


def _as_spread(number: float | None) -> Spread | None:
    return None if number is None else Spread(number, number, number)


def _nbytes(case: Case) -> int:
    return int(
        next((s.values["state_nbytes"] for s in case.samples if "state_nbytes" in s.values and s.measure != "own"), 0)
    )
