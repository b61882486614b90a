"""Which keys of a checkpoint no rank of the job has a place for. Pure.

A rank alone cannot say: the parameters of another pipeline stage are none of its own. So each rank claims, of the keys
below a part, those that it knows; what nobody claims is unexpected. A claim is one bit for each key, in the order of
the sorted keys, which all ranks see alike, and nothing at all if it is all of them, as it is without pipelines.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

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


def by_part(claims: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """All ranks' claims, by part, in the order in which parts first occur."""
    joined: dict[str, list[str]] = {}
    for own in claims:
        for part, text in own.items():
            joined.setdefault(part, []).append(text)
    return joined
