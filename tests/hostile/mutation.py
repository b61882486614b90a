"""Changes to bytes, to JSON and to pickles, as damage and as somebody with a plan makes them. Fast, and by a seed."""

from __future__ import annotations

import json
import pickletools
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 127, 255, 256, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 53)
HUGE = ((1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 31), -(1 << 63), 10**30)
NAMES = (
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/../../b",
    "a//b",
    "x\0y",
    "x\ny",
    "C:\\x",
    "\ud800",
    "e\u0301\u202e\U0001f600",
    "A" * 300,
    "n" * 5000,
    "model.pt",
    "RANK_0.PT",
    "rank_0.pt",
    "manifest.json",
    "score.txt",
    "cc",
    "model",
    "replicated",
    "float32",
    "object",
    "R",
    "S(0)",
    "S(99)",
    "SS(0,99999)",
    "deadbeef",
)
_DEEP = "\u0001deep"
_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [{}],
    [[0, 0, 1 << 40]],
    _DEEP,
)


def odd_value(rng: Random) -> Any:
    """Something that JSON has and that does not belong where it is put."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(NUMBERS)
    if kind < 0.6:
        return rng.choice(HUGE)
    return rng.choice(NAMES) if kind < 0.8 else rng.choice(_ODD)


def mutate_bytes(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """A few changes, each anywhere: bits, bytes, numbers, stretches lost, doubled or exchanged, an end cut off."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not content:
            content += rng.randbytes(4)
        at = rng.randrange(len(content))
        end = min(len(content), at + rng.choice((1, 2, 4, 8, 32, 300)))
        kind = rng.randrange(10)
        if kind < 2:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            content[at] = rng.randrange(256)
        elif kind == 3:
            form, mask = rng.choice((("<H", 0xFFFF), ("<I", 0xFFFFFFFF), (">I", 0xFFFFFFFF), ("<Q", (1 << 64) - 1)))
            number = struct.pack(form, rng.choice(NUMBERS + HUGE) & mask)
            content[at : at + len(number)] = number
        elif kind == 4:
            del content[at:end]
        elif kind == 5:
            content[at:at] = content[at:end]
        elif kind == 6:
            content[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
        elif kind == 7:
            del content[at:]
        else:
            donor = rng.choice(others) if others else data
            start = rng.randrange(len(donor) + 1)
            piece = donor[start : start + rng.choice((1, 8, 64, 1 << 20))]
            content[at:end] = piece
    return bytes(content)


def mutate_json(rng: Random, tree: Any) -> Any:
    """A copy of plain data with a few changes somewhere in it."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = _edit(rng, tree)
    return tree


def _edit(rng: Random, node: Any) -> Any:
    changed: Any
    key: Any
    if type(node) is dict and node:
        changed, key = dict(node), rng.choice(list(node))
    elif type(node) is list and node:
        changed, key = list(node), rng.randrange(len(node))
    else:
        return odd_value(rng)
    child, kind = node[key], rng.randrange(16)
    if kind < 13 and type(child) in (dict, list) and child:
        changed[key] = _edit(rng, child)
    elif kind < 4 and type(child) is int:
        changed[key] = child + rng.choice((-1, 1, 64, -64))
    elif kind < 4 and type(child) is str:
        changed[key] = rng.choice([other for other in (*node, *NAMES) if type(other) is str])
    elif kind < 8:
        changed[key] = odd_value(rng)
    elif kind == 8:
        del changed[key]
    elif kind == 9 and type(changed) is list:
        changed.insert(rng.randrange(len(changed) + 1), child)
    elif kind == 10 and type(changed) is list:
        rng.shuffle(changed)
    elif type(changed) is dict:
        changed[rng.choice(list(node) if rng.random() < 0.5 else list(NAMES))] = child
    else:
        changed[key] = node[rng.randrange(len(node))]
    return changed


def json_text(rng: Random, tree: Any) -> str:
    """As JSON, now and then with what only a text can have: a key twice, any depth, surplus."""
    text = json.dumps(tree)
    if "u0001deep" in text:
        depth = rng.choice((50, 900, 3000))
        text = text.replace('"\\u0001deep"', "[" * depth + "]" * depth)
    if rng.random() < 0.05:
        braces = [at for at, letter in enumerate(text) if letter == "{"]
        at = rng.choice(braces) if braces else 0
        text = text[: at + 1] + '"format":1,"name":"x",' + text[at + 1 :]
    return text


def ops_of(pickle: bytes) -> tuple[bytes, ...]:
    """A pickle, cut into its opcodes with their arguments; what is none of that is the last piece."""
    starts: list[int] = []
    with suppress(ValueError):
        starts += (at for _, _, at in pickletools.genops(pickle) if at is not None)
    return tuple(pickle[a:b] for a, b in pairwise([*starts, len(pickle)]))


def mutate_ops(rng: Random, ops: tuple[bytes, ...], pool: Sequence[tuple[bytes, ...]]) -> tuple[bytes, ...]:
    """Opcodes lost, doubled, exchanged, brought in from another pickle; arguments changed."""
    changed = list(ops)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.randrange(len(changed) + 1), rng.randrange(8)
        other = rng.choice(pool)
        if kind == 0:
            del changed[at : at + rng.choice((1, 1, 3, 20))]
        elif kind == 1:
            changed[at:at] = changed[at : at + rng.choice((1, 2, 5))]
        elif kind == 2 and len(changed) > 1:
            one, two = rng.randrange(len(changed)), rng.randrange(len(changed))
            changed[one], changed[two] = changed[two], changed[one]
        elif kind == 3 and at < len(changed):
            changed[at] = mutate_bytes(rng, changed[at])
        elif kind == 4:
            changed.insert(at, bytes([rng.choice(_OPCODES)]))
        elif kind == 5:
            start = rng.randrange(len(other) + 1)
            changed[at:at] = other[start : start + rng.choice((1, 2, 5, 30))]
        else:
            changed[at:at] = [b"q\x01" if rng.random() < 0.5 else b"h\x01", rng.choice(_TAILS)][: rng.choice((1, 2))]
    return tuple(changed)


_OPCODES = b"(.0123Npqrst]ae}su\x80\x81\x82\x85\x86\x87\x88\x89\x8c\x90\x91\x92\x93\x94RbQPiocHhjJKMGXBCUTIFLS"
_TAILS = (b")R", b"\x85R", b"}b", b"\x81", b"Q", b"s", b"a", b"\x86", b"t", b"u", b"e", b"K\x01")

Change = Callable[[Random, Any], Any]
