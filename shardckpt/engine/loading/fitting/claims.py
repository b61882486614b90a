"""Which keys of a checkpoint no rank of the job has a place for. Pure.

A rank alone cannot say: the parameters of another pipeline stage are none of its own. So each rank claims, of the keys
below a part, those that it knows; what nobody claims is unexpected. A claim is one bit for each key, in the order of
the sorted keys, which all ranks see alike, and nothing at all if it is all of them, as it is without pipelines.
"""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from shardckpt.engine.loading.fit import Fit
from shardckpt.engine.loading.selecting.whole import is_below
from shardckpt.engine.loading.sources import Sources
from shardckpt.errors import CheckpointMismatchError

ALL = ""
"""The claim to every key."""


def claim(saved: Sequence[str], known: Collection[str]) -> str:
    """The claim of a rank that knows these keys, to the saved ones; hexadecimal."""
    bits = 0
    for number, name in enumerate(sorted(saved)):
        bits |= (name in known) << number
    return ALL if bits == (1 << len(saved)) - 1 else f"{bits:x}"


def unclaimed(saved: Sequence[str], claims: Sequence[str]) -> Iterator[str]:
    """The saved keys to which no rank has a claim."""
    if ALL in claims:
        return
    joined = 0
    for text in claims:
        joined |= int(text, 16)
    yield from (name for number, name in enumerate(sorted(saved)) if not joined >> number & 1)


def unexpected_keys(sources: Sources, fit: Fit, claims: Sequence[Mapping[str, str]]) -> list[str]:
    """What the checkpoint has below the parts that are loaded, and no rank has a place for. On rank 0, whose fit it
    is; `sources` are those of the view."""
    claimed, selection = by_part(claims), fit.selection
    left = {name: None for part, those in claimed.items() for name in unclaimed(sources.under(part), those)}

    def is_known(name: str) -> bool:
        """Whether it is loaded, or was left out, by another name."""
        others = selection.own_names(selection.saved_name(name)) if selection.renames else ()
        return any(not selection.takes(other) or (other not in left and is_below(other, claimed)) for other in others)

    once = {selection.saved_name(name): name for name in reversed(left)}
    return [
        f"unexpected: {selection.called(name)} is in the checkpoint but not in the state{nearest(name, fit.names)}"
        for name in left
        if once[selection.saved_name(name)] == name and not is_known(name)
    ]


def nearest(name: str, known: Iterable[str]) -> str:
    """The nearest known name, as a hint. Only names of the same depth are looked at, and not more than 2,000."""
    depth = name.count(".")
    candidates = [other for other in known if other.count(".") == depth][:2000]
    close = difflib.get_close_matches(name, candidates, n=1)
    return f" (nearest: {close[0]})" if close else ""


def is_any_below(prefix: str, ordered: Sequence[str]) -> bool:
    """Whether any of the names, which are in order, begins so."""
    place = bisect.bisect_left(ordered, prefix)
    return place < len(ordered) and ordered[place].startswith(prefix)


def by_part(claims: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """All ranks' claims, by part, in the order in which parts first occur."""
    joined: dict[str, list[str]] = {}
    for own in claims:
        for part, text in own.items():
            joined.setdefault(part, []).append(text)
    return joined


def mismatch_error(problems: Iterable[str], step: int) -> CheckpointMismatchError:
    """One error for all differences of all ranks."""
    every = list(dict.fromkeys(problems))
    shown = "".join(f"\n  - {problem}" for problem in every[:50])
    more = f"\n  ... and {len(every) - 50} more" if len(every) > 50 else ""
    return CheckpointMismatchError(
        f"checkpoint of step {step} does not fit the state, and nothing was loaded; {len(every)} differences:"
        f"{shown}{more}\nChange the state, or allow a kind of difference with LoadPolicy(...).",
        problems=every,
        step=step,
    )
