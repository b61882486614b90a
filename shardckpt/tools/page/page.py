"""The page: sections of a run's facts, and nothing that would have to be fetched. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from html import escape

from shardckpt.tools.examining.findings import bytes_text
from shardckpt.tools.listing import StepLine
from shardckpt.tools.page.charts import bars, line, seconds_text, shares, table, tiles, timeline
from shardckpt.tools.page.facts import RunFacts
from shardckpt.tools.page.saves import SaveLine
from shardckpt.tools.page.style import CSS

_MOST_ROWS = 200
"""Steps and saves that are listed one by one: the newest."""
_MOST_BARS = 40
_MOST_POINTS = 2000
_HOW = (
    "No log of saves was found, so there are no timings. checkpoints.subscribe(sc.SaveLog('saves.jsonl')) writes one; "
    "shardckpt report --log PATH reads it, and in the root of a run on a file system it is found by itself."
)


def page(facts: RunFacts) -> str:
    """The whole document."""
    parts = [_head(facts), *_sizes(facts), *_timings(facts), *_timelines(facts), *_retention(facts), *_failures(facts)]
    body = "\n".join([*parts, _steps(facts)])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(facts.url)}: checkpoints</title><style>{CSS}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def _section(title: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def _soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _committed(facts: RunFacts) -> list[StepLine]:
    return [step for step in facts.steps if step.state in ("committed", "model only", "damaged record")]


def _saved(facts: RunFacts) -> list[SaveLine]:
    return [save for save in facts.saves if save.event == "committed"][-_MOST_POINTS:]


def _head(facts: RunFacts) -> str:
    steps, saved = _committed(facts), _saved(facts)
    newest = steps[-1] if steps else None
    figures = [("committed steps", str(len(steps))), ("newest step", str(newest.step) if newest else "-")]
    figures.append(("size of all", bytes_text(sum(step.nbytes or 0 for step in steps))))
    if newest is not None and newest.nbytes is not None:
        figures.append(("size of the newest", bytes_text(newest.nbytes)))
    if saved:
        figures += [
            ("training held by the last save", seconds_text(saved[-1].stall_s)),
            ("until it was committed", seconds_text(saved[-1].total_s)),
            ("rate of the last save", f"{bytes_text(saved[-1].rate)}/s"),
        ]
    lost = sum(save.event in ("failed", "unknown") for save in facts.saves)
    if facts.saves:
        figures.append(("saves that failed", str(lost)))
    return f"<h1>{escape(facts.url)}</h1>{_soft(f'looked at {_minute(facts.made)}')}{tiles(figures)}"


def _minute(made: str) -> str:
    """An ISO 8601 time in UTC, for people; any other text as it is."""
    return f"{made[:10]} {made[11:16]} UTC" if made[10:11] == "T" else made


def _sizes(facts: RunFacts) -> Iterator[str]:
    if facts.parts:
        yield _section(f"Space by part, step {facts.parts_step}", shares(facts.parts))
    steps = [step for step in _committed(facts) if step.nbytes is not None][-_MOST_BARS:]
    if steps:
        rows = [(str(step.step), float(step.nbytes or 0), bytes_text(step.nbytes or 0)) for step in steps]
        yield _section("Size by step", bars(rows), _of(len(steps), len(_committed(facts)), "steps"))


def _of(shown: int, there: int, what: str) -> str:
    return _soft(f"the newest {shown} of {there} {what}") if shown < there else ""


def _timings(facts: RunFacts) -> Iterator[str]:
    saved = _saved(facts)
    if facts.log is None:
        yield _section("Timings", _soft(_HOW))
        return
    if not saved:
        yield _section("Timings", _soft(f"{facts.log} tells of no save that was committed."))
        return
    ends = (f"step {saved[0].step}", f"step {saved[-1].step}")
    figures = (
        ("How long training was held up", [save.stall_s for save in saved], seconds_text, 1),
        ("From save() to the commit", [save.total_s for save in saved], seconds_text, 0),
        ("Rate", [save.rate for save in saved], lambda rate: f"{bytes_text(rate)}/s", 2),
        ("Slowest rank, writing", [save.slowest_s for save in saved], seconds_text, 3),
    )
    plots = "".join(
        line(values, title=title, most=said(max(values)), ends=ends, colour=colour)
        for title, values, said, colour in figures
    )
    span = f"{len(saved)} saves, {_time(saved[0].at)} to {_time(saved[-1].at)}"
    yield _section("Over time", f'<div class="two">{plots}</div>', _soft(span))


def _time(at: float) -> str:
    try:
        return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return "-"


def _timelines(facts: RunFacts) -> Iterator[str]:
    saved = [save for save in _saved(facts) if any(rank.spans for rank in save.ranks)]
    if not saved:
        return
    slowest = max(saved, key=lambda save: save.total_s)
    yield _section(f"The last save by rank, step {saved[-1].step}", timeline(saved[-1].ranks, end=saved[-1].at))
    if slowest is not saved[-1]:
        said = f"The save that took longest, step {slowest.step} ({seconds_text(slowest.total_s)})"
        yield _section(said, timeline(slowest.ranks, end=slowest.at))


def _retention(facts: RunFacts) -> Iterator[str]:
    deleted = [save for save in facts.saves if save.event == "deleted"]
    if not facts.policy and not deleted:
        return
    content = []
    if facts.policy:
        steps = _committed(facts)[-_MOST_ROWS:]
        rows = [(str(step.step), _score(step), step.kept or "not kept by any rule") for step in reversed(steps)]
        content += [
            _soft(f"by {facts.policy}"),
            table(("step", "score", "stays because"), rows, numbers=frozenset({0, 1})),
        ]
    if deleted:
        numbers = ", ".join(str(save.step) for save in deleted[-_MOST_BARS:])
        more = f", the last {_MOST_BARS} of them" if len(deleted) > _MOST_BARS else ""
        content.append(_soft(f"deleted so far, as the log tells: {len(deleted)} steps{more}: {numbers}"))
    yield _section("Retention", *content)


def _failures(facts: RunFacts) -> Iterator[str]:
    yield from _lost(facts, "Saves that were not committed", "failed", "unknown", "skipped")
    yield from _lost(facts, "Callbacks and subscribers that failed", "subscriber failed")


def _lost(facts: RunFacts, title: str, *events: str) -> Iterator[str]:
    lost = [save for save in facts.saves if save.event in events]
    if lost:
        rows = [(str(save.step), _time(save.at), save.event, save.error) for save in reversed(lost[-_MOST_ROWS:])]
        shown = table(("step", "when", "what", "why"), rows, numbers=frozenset({0}))
        yield _section(title, shown, _of(len(rows), len(lost), "such events"))


def _score(step: StepLine) -> str:
    return "-" if step.score is None else f"{step.score:g}"


def _steps(facts: RunFacts) -> str:
    saves = {save.step: save for save in facts.saves if save.event == "committed"}
    shown: Sequence[StepLine] = facts.steps[-_MOST_ROWS:]
    if not shown:
        return _section("Steps", _soft("there are none"))
    rows = [_row(step, saves.get(step.step) if step.step is not None else None) for step in reversed(shown)]
    heads = ("step", "saved", "size", "ranks", "score", "held", "total", "rate", "state", "parts")
    return _section(
        "Steps", table(heads, rows, numbers=frozenset(range(2, 8)) | {0}), _of(len(shown), len(facts.steps), "steps")
    )


def _row(step: StepLine, save: SaveLine | None) -> tuple[str, ...]:
    timings = ("-",) * 3
    if save is not None:
        timings = (seconds_text(save.stall_s), seconds_text(save.total_s), f"{bytes_text(save.rate)}/s")
    state = step.state if step.state in ("committed", "model only") else f"{step.state} ({step.folder})"
    return (
        "-" if step.step is None else str(step.step),
        (step.created or "-")[:16].replace("T", " "),
        "-" if step.nbytes is None else bytes_text(step.nbytes),
        "-" if step.world_size is None else str(step.world_size),
        _score(step),
        *timings,
        state,
        ", ".join(step.parts),
    )
