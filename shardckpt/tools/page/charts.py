"""Pieces of the page: numbers as bars, lines and spans. Pure; texts of others are escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from shardckpt.tools.examining.findings import bytes_text
from shardckpt.tools.page.saves import RankSpans, Span
from shardckpt.tools.page.style import COLOURS

_HELD = ("save", "wait")
_PHASES = {"save": 1, "wait": 4, "stage": 0, "meet": 5, "write": 2, "commit": 3}
"""Phase of a save -> its colour. Those inside of these (`seal`, `put`) are told in words."""
_MEANING = {
    "save": "in save(), training held",
    "wait": "waiting for the copy, training held",
    "stage": "copy",
    "meet": "waiting for other ranks",
    "write": "write",
    "commit": "commit",
}
_MOST_RANKS = 32


def seconds_text(seconds: float) -> str:
    """For people: "350 ms", "2.1 s", "3 min 20 s"."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """Large figures with what they are."""
    cells = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in facts)
    return f'<div class="tiles">{"".join(cells)}</div>'


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Name, value and the value in words; all to the scale of the largest."""
    most = max((value for _, value, _ in rows), default=0) or 1
    return "".join(
        f'<div class="row"><span>{escape(name)}</span><div class="bar">{_piece(value / most, 0)}</div>'
        f'<span class="n">{escape(text)}</span></div>'
        for name, value, text in rows
    )


def shares(parts: Mapping[str, int]) -> str:
    """One bar, divided; and what each colour is."""
    total = sum(parts.values()) or 1
    pieces = "".join(_piece(n / total, k, f"{name}: {bytes_text(n)}") for k, (name, n) in enumerate(parts.items()))
    entries = ((f"{name} {bytes_text(n)} ({_percent(n / total)})", k) for k, (name, n) in enumerate(parts.items()))
    return f'<div class="bar" style="height:1.6rem">{pieces}</div>{legend(entries)}'


def _percent(share: float) -> str:
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def legend(entries: Iterable[tuple[str, int]]) -> str:
    items = (
        f'<li><i style="background:var(--c{colour % COLOURS})"></i>{escape(text)}</li>' for text, colour in entries
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _piece(share: float, colour: int, title: str = "") -> str:
    shown = f' title="{escape(title)}"' if title else ""
    return f'<i{shown} style="width:{100 * share:.4g}%;background:var(--c{colour % COLOURS})"></i>'


def line(values: Sequence[float], *, title: str, most: str, ends: tuple[str, str], colour: int) -> str:
    """Values from left to right, evenly, from zero up to the largest of them, which is called `most`."""
    top = max(values, default=0) or 1
    across = max(len(values) - 1, 1)
    points = [(1000 * k / across, 100 - 100 * value / top) for k, value in enumerate(values)]
    path = " ".join(f"{'L' if k else 'M'}{x:.1f} {y:.2f}" for k, (x, y) in enumerate(points))
    dots = "".join(f"M{x:.1f} {y:.2f}h0" for x, y in points) if len(points) <= 200 else ""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="plot"><div class="y"><span>{escape(most)}</span>'
        f'<span>0</span></div><svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}"><path d="{path}" stroke="var(--c{colour})" stroke-width="1.5"/>'
        f'<path d="{dots}" stroke="var(--c{colour})" stroke-width="5"/></svg>'
        f'<div class="x"><span>{escape(ends[0])}</span><span>{escape(ends[1])}</span></div></div></figure>'
    )


def timeline(ranks: Sequence[RankSpans], *, end: float) -> str:
    """What each rank did in a save. The upper half of a row is what held training, the lower the work beside it."""
    shown = _slowest(ranks)
    spans = [span for rank in shown for span in rank.spans]
    start = min([rank.began for rank in shown] + [span.began for span in spans])
    last = max([end] + [span.began + span.seconds for span in spans])
    whole = max(last - start, 1e-9)
    rows = "".join(
        f'<div class="row"><span>rank {rank.rank}</span><div class="lane">'
        f"{''.join(_span(span, rank, start, whole) for span in rank.spans)}</div>"
        f'<span class="n">{escape(_writing(rank))}</span></div>'
        for rank in shown
    )
    left = f"{len(ranks) - len(shown)} faster ranks are not shown. " if len(shown) < len(ranks) else ""
    axis = f'<div class="row"><span></span><div class="plot" style="display:block;margin:0"><div class="x"><span>0</span><span>{seconds_text(whole)}</span></div></div><span class="n">writing</span></div>'  # noqa: E501
    names = {span.name for span in spans}
    known = legend((_MEANING[name], colour) for name, colour in _PHASES.items() if name in names)
    return f'{rows}{axis}{known}<p class="soft">{left}Times are by the clock of each rank.</p>'


def _slowest(ranks: Sequence[RankSpans]) -> list[RankSpans]:
    chosen = sorted(ranks, key=lambda rank: -_seconds(rank, "write"))[:_MOST_RANKS]
    return sorted(chosen, key=lambda rank: rank.rank)


def _seconds(rank: RankSpans, name: str) -> float:
    return sum(span.seconds for span in rank.spans if span.name == name)


def _writing(rank: RankSpans) -> str:
    return seconds_text(_seconds(rank, "write")) if any(span.name == "write" for span in rank.spans) else "-"


def _span(span: Span, rank: RankSpans, start: float, whole: float) -> str:
    if span.name not in _PHASES:
        return ""
    inside = ""
    if span.name == "write":
        inside = f" (in it checksums {seconds_text(_seconds(rank, 'seal'))}, put {seconds_text(_seconds(rank, 'put'))})"
    place = f"left:{100 * (span.began - start) / whole:.4g}%;width:{100 * span.seconds / whole:.4g}%"
    kind = "held" if span.name in _HELD else "work"
    title = f"{_MEANING[span.name]}: {seconds_text(span.seconds)}{inside}"
    return f'<i class="{kind}" title="{escape(title)}" style="{place};background:var(--c{_PHASES[span.name]})"></i>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: frozenset[int] = frozenset()) -> str:
    """`numbers`: which columns are, and stand to the right."""
    mark = [' class="n"' if k in numbers else "" for k in range(len(heads))]
    head = "".join(f"<th{mark[k]}>{escape(text)}</th>" for k, text in enumerate(heads))
    body = "".join(
        f"<tr>{''.join(f'<td{mark[k]}>{escape(text)}</td>' for k, text in enumerate(row))}</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
