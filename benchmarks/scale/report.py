"""The measured cases as Markdown, and as a picture if matplotlib is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.scale.cases import Case
from benchmarks.scale.history import Asked
from benchmarks.scale.world import World

_LIMITS: tuple[tuple[str, float, str], ...] = (
    ("planning on a rank, first, s", 0.5, "first_s"),
    ("the same, unchanged (without reading the state), ms", 10, "again_ms"),
    ("rank 0, receipts to record, s", 3, "rank0_s"),
    ("record, MiB", 4, "record_mib"),
    ("all indexes of a rank, KiB", 256, "index_kib"),
    ("load planning, same mesh, s", 0.5, "same_s"),
    ("load planning, half as many ranks, s", 1, "other_s"),
    ("metadata a loading rank reads, same mesh, MiB", 5, "same_mib"),
    ("the same, half as many ranks, MiB", 16, "other_mib"),
)


def render(cases: Sequence[Case], history: Mapping[str, Asked], steps: int, world: World) -> str:
    """All tables."""
    lines = [*_costs(cases), *_loads(cases), *_peers(cases), *_growth(cases), *_against_limits(cases)]
    lines += [*_history(history, steps), *_projections(cases, world)]
    return "\n".join(lines)


def figures(case: Case) -> dict[str, float]:
    """What there are limits for."""
    loads = list(case.loads.values())
    same, other = loads[0], loads[min(1, len(loads) - 1)]
    return {
        "first_s": case.rank_s["take apart, first"] + case.rank_s["plan, first"],
        "again_ms": case.rank_s["plan, again"] * 1e3,
        "rank0_s": sum(case.rank0_s.values()),
        "record_mib": case.record_nbytes / (1 << 20),
        "index_kib": case.index_nbytes / (1 << 10),
        "same_s": same.total_s,
        "other_s": other.total_s,
        "same_mib": same.nbytes / (1 << 20),
        "other_mib": other.nbytes / (1 << 20),
    }


def _costs(cases: Sequence[Case]) -> list[str]:
    rows = [
        [
            case.name, f"{case.mesh.ranks:,}", case.mesh.label, f"{case.tensors:,}",
            f"{figures(case)['first_s'] * 1e3:.0f}",
            f"{figures(case)['again_ms']:.1f} + {case.rank_s['take apart, again'] * 1e3:.1f}",
            f"{case.rank_objects:,}", f"{sum(case.rank0_s.values()):.2f}", f"{case.rank0_collected_s:.2f}",
            f"{case.receipts_nbytes / 1e6:.1f}", f"{case.record_nbytes / 1e3:,.0f} ({case.told_nbytes / 1e3:,.0f})",
            f"{case.index_nbytes / 1e3:.0f} + {case.tree_nbytes / 1e3:.0f}",
        ]
        for case in cases
    ]  # fmt: skip
    head = [
        "model", "ranks", "mesh", "tensors of a rank", "plan and read the state: first, ms", "unchanged, ms",
        "objects kept",
        "rank 0: receipts to record, s", "with the collector, s", "receipts, MB", "record (packed), kB",
        "indexes + trees of a rank, kB",
    ]  # fmt: skip
    return _table("Saving", head, rows)


def _loads(cases: Sequence[Case]) -> list[str]:
    rows = []
    for case in cases:
        for label, cost in case.loads.items():
            parts = " + ".join(f"{cost.seconds[part] * 1e3:.0f}" for part in ("record", "compare", "plan"))
            rows.append([
                case.name, f"{case.mesh.ranks:,}", "the same" if label == case.mesh.label else label,
                f"{cost.total_s * 1e3:.0f} ({parts})", f"{cost.nbytes / 1e6:.2f}", str(cost.requests),
                f"{cost.objects:,}",
            ])  # fmt: skip
    head = [
        "model", "saved by ranks", "loaded on", "planning on a rank, ms (record + compare + plan)",
        "metadata it reads, MB", "requests", "objects kept",
    ]  # fmt: skip
    return _table("Loading", head, rows)


def _peers(cases: Sequence[Case]) -> list[str]:
    rows = []
    for case in cases:
        if case.dcp is not None:
            dcp, same = case.dcp, next(iter(case.loads.values()))
            first, job = figures(case)["first_s"], f"{case.name}, {case.mesh.ranks}"
            rows += [
                [f"{job}: shardckpt", f"{first * 1e3:.0f}", f"{case.receipts_nbytes / 1e6:.1f}",
                 f"{sum(case.rank0_s.values()):.2f}", f"{case.record_nbytes / 1e6:.2f}", f"{same.total_s:.2f}"],
                [f"{job}: DCP", f"{dcp.plan_s * 1e3:.0f}",
                 f"{(dcp.sent_nbytes + dcp.told_nbytes) / 1e6:.1f}", f"{dcp.rank0_s:.2f}",
                 f"{dcp.metadata_nbytes / 1e6:.2f}", f"{dcp.read_s + dcp.load_s:.2f}"],
            ]  # fmt: skip
    head = [
        "", "plan of a rank, ms", "messages to and from rank 0, MB", "rank 0, s", "record or .metadata, MB",
        "load planning on every rank, s",
    ]  # fmt: skip
    return _table("Beside DCP's own planner", head, rows)


def _growth(cases: Sequence[Case]) -> list[str]:
    """From the fewest ranks above 500 to the most, for each model that has both."""
    rows = []
    for name in dict.fromkeys(case.name for case in cases):
        own = sorted((c for c in cases if c.name == name and c.mesh.ranks >= 512), key=lambda case: case.mesh.ranks)
        if len(own) > 1:
            few, many = figures(own[0]), figures(own[-1])
            ranks = f"{own[0].mesh.ranks:,} to {own[-1].mesh.ranks:,}"
            keys = ("first_s", "again_ms", "same_s", "other_s")
            rows.append([name, ranks, *(f"{many[key] / few[key]:.2f}" for key in keys)])
    head = ["model", "ranks", "plan, first", "plan, unchanged", "load planning, same mesh", "half as many ranks"]
    return _table("How a rank's cost grows (times)", head, rows)


def _against_limits(cases: Sequence[Case]) -> list[str]:
    case = next((case for case in cases if case.mesh.ranks == 4096), None)
    if case is None:
        return []
    found = figures(case)
    rows = [
        [what, f"{found[key]:.3g}", f"{limit:g}", "yes" if found[key] <= limit else "**no**"]
        for what, limit, key in _LIMITS
    ]
    return _table(f"{case.name}, 4,096 ranks: against the limits", ["measure", "is", "at most", ""], rows)


def _history(history: Mapping[str, Asked], steps: int) -> list[str]:
    rows = [
        [what, f"{asked.seconds:.2f}", ", ".join(f"{count:,} {kind}" for kind, count in asked.requests.items())]
        for what, asked in history.items()
    ]
    return _table(f"A run of {steps:,} steps on an object store", ["question", "own time, s", "requests"], rows)


def _projections(cases: Sequence[Case], world: World) -> list[str]:
    lines = []
    for case in cases:
        for what, projection in case.projections.items():
            rows = [[part, f"{seconds:.2f}"] for part, seconds in projection.parts.items()]
            rows.append(["**all**", f"**{projection.total_s:.2f}**"])
            rows.append(["the bytes alone", f"{projection.bound_s:.2f}"])
            heading = f"{case.name} on {case.mesh.ranks:,} ranks, {case.nbytes / 1e12:.2f} TB: projected {what}"
            lines += _table(f"{heading}, {projection.requests:,} requests", ["", "s"], rows)
    if lines:
        facts = ", ".join(f"{name} {value:g}" for name, value in asdict(world).items())
        lines += [f"Assumed: {facts}.", ""]
    return lines


def _table(heading: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"**{heading}**", "", *(f"| {' | '.join(line)} |" for line in lines), ""]


def plot(cases: Sequence[Case], path: Path) -> bool:
    """Cost of a rank and of rank 0 over the number of ranks, on logarithmic axes; whether it could be drawn."""
    if find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    for name in dict.fromkeys(case.name for case in cases):
        own = sorted((case for case in cases if case.name == name), key=lambda case: case.mesh.ranks)
        ranks = [case.mesh.ranks for case in own]
        for key, label in (("first_s", "plan"), ("rank0_s", "rank 0"), ("same_s", "load, same mesh")):
            axes[0].plot(ranks, [figures(case)[key] for case in own], marker="o", label=f"{name}: {label}")
        axes[1].plot(ranks, [case.record_nbytes for case in own], marker="o", label=f"{name}: record")
        axes[1].plot(ranks, [case.index_nbytes for case in own], marker="o", label=f"{name}: indexes of a rank")
    for axis, unit in zip(axes, ("seconds", "bytes"), strict=True):
        _finish(axis, unit)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return True


def _finish(axis: Any, unit: str) -> None:
    axis.set(xscale="log", yscale="log", xlabel="ranks", ylabel=unit)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
