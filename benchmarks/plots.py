"""PNG files: bars of ratios against ours, and where the time of one save goes on each rank. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.report import OURS, Case, cases, title
from benchmarks.rounds import Results

_PANELS = (
    ("durable save", "save", "seconds"),
    ("save, not synced", "cached", "seconds"),
    ("async save: training is held", "stall", "stall_s"),
    ("async save: training loses", "stall", "lost_s"),
    ("training loop: what its saves add", "loop", "lost_s"),
    ("load, warm", "load", "seconds"),
    ("load, cold", "cold", "seconds"),
)
_PHASES = (("stall", "tab:red"), ("stage", "tab:orange"), ("write", "tab:blue"), ("commit", "tab:green"))


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def plot(results: Results, folder: Path) -> list[Path]:
    """Two pictures for each state and number of ranks, as far as there are samples."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for case in cases(results):
        for kind, draw in (("ratios", _ratios), ("timeline", _timeline)):
            figure = draw(case)
            if figure is not None:
                path = folder / f"{kind}_{case.label.replace(', ', '_').replace(' ', '')}_{case.ranks}.png"
                figure.savefig(path, dpi=120, bbox_inches="tight")
                made.append(path)
    matplotlib.pyplot.close("all")
    return made


def _ratios(case: Case) -> Any:
    """One panel for each measure: how many times as long as ours; whiskers from the least to the most."""
    import matplotlib.pyplot as plt

    panels = [panel for panel in _PANELS if case.spread(OURS, *panel[1:]) and len(case.taking_part(panel[1])) > 1]
    if not panels:
        return None
    heights = [len(case.taking_part(measure)) for _, measure, _ in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, 0.9 * len(panels) + 0.28 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for (name, measure, value), axis in zip(panels, axes[:, 0], strict=True):
        _bars(axis, case, measure, value)
        axis.set_title(f"{name}: times ours (shorter is better)", loc="left", fontsize=9)
    figure.suptitle(title(case).removeprefix("### "), fontsize=10)
    figure.tight_layout()
    return figure


def _bars(axis: Any, case: Case, measure: str, value: str) -> None:
    ours = case.spread(OURS, measure, value)
    assert ours is not None
    engines, middles, below, above = [], [], [], []
    for engine in case.taking_part(measure):
        spread = case.spread(engine, measure, value)
        if spread is None or ours.middle <= 0:
            continue
        engines.append(engine)
        middles.append(spread.middle / ours.middle)
        below.append((spread.middle - spread.least) / ours.middle)
        above.append((spread.most - spread.middle) / ours.middle)
    colours = ["tab:blue" if engine == OURS else "tab:gray" for engine in engines]
    axis.barh(engines, middles, xerr=[below, above], color=colours, error_kw={"lw": 0.8, "capsize": 2})
    axis.axvline(1.0, color="black", lw=0.6)
    axis.bar_label(axis.containers[-1], fmt="%.2g", padding=6, fontsize=7)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)


def _timeline(case: Case) -> Any:
    """The last save of the first round on each rank: its phases one after the other, in seconds since the call."""
    import matplotlib.pyplot as plt

    samples = case.of(OURS, "stall") or case.of(OURS, "save")
    if not samples:
        return None
    ranks: Sequence[dict[str, float]] = samples[0].values["phases"]
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.35 * len(ranks)))
    for number, phases in enumerate(ranks):
        at = 0.0
        for name, colour in _PHASES:
            label = name if number == 0 else None
            axis.barh(number, phases[name], left=at, color=colour, label=label, height=0.6)
            at += phases[name]
    axis.set_yticks(range(len(ranks)), [f"rank {number}" for number in range(len(ranks))])
    axis.invert_yaxis()
    axis.set_xlabel("seconds since the call")
    axis.legend(ncols=len(_PHASES), fontsize=7, loc="lower right")
    axis.set_title(f"One save of shardckpt: {title(case).removeprefix('### ')}", fontsize=9)
    return figure
