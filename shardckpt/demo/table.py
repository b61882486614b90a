"""What a show has found: the records of its runs, what must hold of them, and the tables for a person. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardckpt.demo.messages import Mesh, Resumed, Saved, Writing
from shardckpt.format.layout import MANIFEST

Losses = Mapping[int, float]
"""By step; of the global batch, before the step's update."""


@dataclass(slots=True)
class Record:
    """What one run told."""

    mesh: Mesh
    losses: dict[int, float] = field(default_factory=dict)
    saves: list[Saved] = field(default_factory=list)
    """One per step and rank."""
    resumed: Resumed | None = None
    stalled: Writing | None = None
    committed: tuple[int, ...] | None = None
    """At the end of a run that had a manager; None if it did not come to its end."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """What lies in the folder of an attempt that was killed."""

    folder: str
    files: Mapping[str, int]
    """Name to bytes."""


@dataclass(frozen=True, slots=True)
class Results:
    """All that a show has found."""

    reference: Record
    interrupted: Record
    resumed: Sequence[Record]
    """First on the same mesh, then on the others."""
    kill_at: int
    """The step in whose save the ranks were killed."""
    save_every: int
    last_step: int
    tolerance: float
    leftover: Leftover | None = None
    """None if nothing was found there."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold, and what was seen."""

    holds: bool
    claim: str
    seen: str


def judge(results: Results) -> list[Check]:
    """Everything that must hold of a show."""
    return [
        _saving_is_harmless(results),
        _killed_in_a_save(results),
        *(check for record in results.resumed for check in _resumed_well(results, record)),
        _saves_again(results),
    ]


def _saving_is_harmless(results: Results) -> Check:
    reference, saved = results.reference.losses, results.interrupted.losses
    same = [step for step in saved if _same_bits(saved[step], reference.get(step))]
    holds = len(same) == len(saved) >= results.kill_at
    return Check(holds, "saving does not change the training", f"{len(same)} of {len(saved)} losses are bit-identical")


def _killed_in_a_save(results: Results) -> Check:
    stalled = results.interrupted.stalled
    claim = f"killed while step {results.kill_at} was written; training went on"
    if stalled is None or results.interrupted.committed is not None:
        return Check(False, claim, "the ranks were not killed")
    last = max(results.interrupted.losses, default=0)
    unfinished = results.leftover is not None and MANIFEST not in results.leftover.files
    holds = stalled.step == results.kill_at < last and unfinished
    return Check(holds, claim, f"in {stalled.key}; training at step {last}")


def _resumed_well(results: Results, record: Record) -> Iterator[Check]:
    same_mesh = record.mesh == results.interrupted.mesh
    yield _resumed_the_right_step(results, record)
    steps = range(results.kill_at - results.save_every + 1, results.last_step + 1)
    if set(record.losses) != set(steps):
        yield Check(False, f"{record.mesh}: trained to the end", f"steps {sorted(record.losses)}")
    elif same_mesh:
        same = [step for step in steps if _same_bits(record.losses[step], results.reference.losses.get(step))]
        seen = f"{len(same)} of {len(steps)} losses are bit-identical"
        yield Check(len(same) == len(steps), f"{record.mesh}: losses equal the uninterrupted run's", seen)
    else:
        difference = largest_difference(record.losses, results.reference.losses)
        seen = f"largest difference {difference:.1e}"
        yield Check(difference <= results.tolerance, f"{record.mesh}: losses agree within {results.tolerance:g}", seen)


def _resumed_the_right_step(results: Results, record: Record) -> Check:
    expected = results.kill_at - results.save_every
    found = record.resumed
    claim = f"{record.mesh}: resumes step {expected}; {results.kill_at} is not there"
    if found is None:
        return Check(False, claim, "nothing was resumed")
    seen = f"step {found.step} of {', '.join(map(str, found.committed))}"
    return Check(found.step == expected and results.kill_at not in found.committed, claim, seen)


def _saves_again(results: Results) -> Check:
    last = results.resumed[-1]
    expected = {*range(results.save_every, results.last_step + 1, results.save_every)}
    holds = last.committed is not None and set(last.committed) == expected
    seen = f"committed: {', '.join(map(str, last.committed or ()))}"
    return Check(holds, f"{last.mesh}: saves on, step {results.kill_at} again", seen)


def _same_bits(one: float, other: float | None) -> bool:
    """Equal as bits are: by their exact hexadecimal form, so that no rounding of a print can hide a difference."""
    return other is not None and one.hex() == other.hex()


def largest_difference(losses: Losses, reference: Losses) -> float:
    """Over the steps of `losses`; infinite if the reference lacks one of them or one is not a number."""
    differences = [abs(loss - reference.get(step, float("inf"))) for step, loss in losses.items()]
    return max((d if d == d else float("inf") for d in differences), default=float("inf"))


def render(results: Results, checks: Sequence[Check]) -> str:
    """Everything for a person to read, at 80 columns."""
    parts = [render_saves(results), render_kill(results), render_losses(results), render_checks(checks)]
    return "\n\n".join(filter(None, parts))


def render_saves(results: Results) -> str:
    """One line per save: the slowest rank's seconds, the bytes and the rate of all ranks together."""
    lines = ["SAVES, ms   step  stall  stage  write commit  total        MB    MB/s"]
    for record in (results.interrupted, *results.resumed):
        for step in sorted({save.step for save in record.saves}):
            ranks = [save for save in record.saves if save.step == step]
            phases = ("stall", "stage", "write", "commit", "total")
            seconds = [max(getattr(save, f"{phase}_s") for save in ranks) for phase in phases]
            rate = ranks[0].nbytes / seconds[-1] if seconds[-1] else 0.0
            times = " ".join(f"{phase_s * 1e3:6.0f}" for phase_s in seconds)
            lines.append(f"on {record.mesh.short:<8} {step:4} {times} {ranks[0].nbytes / 1e6:9.1f} {rate / 1e6:7.0f}")
    return "\n".join(lines)


def render_kill(results: Results) -> str:
    """What the killed save has left, and why it is not a checkpoint."""
    lines = ["KILLED"]
    if results.leftover is not None:
        files = ", ".join(f"{name} ({_size(size)})" for name, size in sorted(results.leftover.files.items()))
        recorded = "has a record" if MANIFEST in results.leftover.files else f"no {MANIFEST}, so not a checkpoint"
        lines.append(f"{results.leftover.folder}: {recorded}")
        lines.extend(_wrapped(f"left there: {files or 'nothing'}"))
    for record in results.resumed:
        if record.resumed is not None:
            found = record.resumed
            lines.append(f"resumed on {record.mesh}: step {found.step}, in {found.elapsed_s:.2f} s")
            lines.extend(
                line for step, why in found.skipped for line in _wrapped(f"skipped step {step}: {why}", "    ")
            )
    return "\n".join(lines)


def render_losses(results: Results) -> str:
    """Losses at some telling steps, before and after, and each run's largest difference to the reference."""
    resumed_at = results.kill_at - results.save_every
    steps = tuple(dict.fromkeys((1, resumed_at, resumed_at + 1, results.kill_at, results.last_step)))
    lines = [f"{'LOSSES at step':<14}" + "".join(f"{step:>11}" for step in steps) + "   max diff"]
    rows = [("uninterrupted", results.reference), ("killed", results.interrupted)]
    rows += [(f"resumed {record.mesh.short}", record) for record in results.resumed]
    for name, record in rows:
        difference = largest_difference(record.losses, results.reference.losses)
        shown = "" if record is results.reference else f"{difference:.1e}" if difference else "0"
        lines.append(
            f"{name:<14}" + "".join(f"{_loss(record.losses.get(step)):>11}" for step in steps) + f"{shown:>11}"
        )
    return "\n".join(line.rstrip() for line in lines)


def render_checks(checks: Sequence[Check]) -> str:
    lines = ["CHECKS"]
    for check in checks:
        lines.extend([f"{'ok    ' if check.holds else 'FAILED'} {check.claim}", f"         {check.seen}"])
    return "\n".join(lines)


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.7f}"


def _size(nbytes: int) -> str:
    """With a space at which no line is broken."""
    for unit, name in ((1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f}\u00a0{name}"
    return f"{nbytes}\u00a0bytes"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=indent, subsequent_indent=indent + "    ", break_on_hyphens=False)
