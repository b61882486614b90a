"""The formats that are read: how each is drawn from what is known of it, and what reads it.

Whole checkpoints of ours are in `checkpoints.py`, those of other programs in `foreign.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from shardckpt.errors import CheckpointError
from shardckpt.format.index import decode_index
from shardckpt.format.manifest import decode_manifest, encode_manifest
from shardckpt.format.tree import decode_tree, encode_tree
from shardckpt.run.card import CARD, read_model_card
from shardckpt.run.scores import decode_score
from shardckpt.storage.memory import MemoryObjects
from tests.format.images import build_image
from tests.format.record.records import DATA, sign, signed
from tests.format.restricted.spelling import good
from tests.hostile.attacks import PICKLES
from tests.hostile.mutation import NAMES, json_text, mutate_bytes, mutate_json, mutate_ops, ops_of

Read = Callable[[Any], None]


@dataclass(frozen=True)
class Format:
    """One format: its seeds, a change of one seed with the others at hand, and the reader of what came out."""

    name: str
    seeds: Sequence[Any]
    change: Callable[[Random, Sequence[Any]], Any]
    read: Read
    errors: tuple[type[Exception], ...]
    """All that may come out of the reader."""
    sources: tuple[str, ...]
    """Modules whose lines count as ground that a case may break."""
    parse: Callable[[Any], Any] = lambda entry: entry
    """From what came out of a change to a seed for further ones; may raise."""

    def seed_of(self, entry: Any) -> Any:
        """None where a case cannot be a seed."""
        try:
            return self.parse(entry)
        except Exception:  # whatever json, pickletools and the like say of what is not well-formed
            return None


STATE = {
    "model": {"w": torch.ones(6, 4), "b": torch.zeros(3, dtype=torch.bfloat16), "tied": torch.arange(5)},
    "rank": [1, 2.5, "x", (None, b"y"), {"n": {1, 2}}],
}
IMAGE = build_image(STATE)
_AT, _NBYTES, _ = IMAGE.tail.index
_INDEX = json.loads(IMAGE.content[_AT : _AT + _NBYTES])


def change_index(rng: Random, pool: Sequence[Any]) -> bytes:
    """The JSON of an index."""
    text = json_text(rng, mutate_json(rng, rng.choice(pool))).encode()
    return mutate_bytes(rng, text) if rng.random() < 0.1 else text


def read_index(data: bytes) -> None:
    index = decode_index(data, len(IMAGE.content))
    assert all(0 <= r.at <= r.at + r.nbytes <= len(IMAGE.content) for r in index.records)
    index.by_name()


def change_record(rng: Random, pool: Sequence[Any]) -> bytes:
    """A record, mostly with the sum that belongs to it: an attacker makes it so."""
    kind = rng.random()
    if kind < 0.1:
        return mutate_bytes(rng, DATA)
    if kind < 0.25:
        return sign(mutate_bytes(rng, DATA.rpartition(b'"sha256": "')[0]))
    content = mutate_json(rng, rng.choice(pool))
    if type(content) is not dict or rng.random() < 0.1:
        return sign(json_text(rng, content).encode()[:-1] + b",\n")
    return signed(dict(content))


def read_record(data: bytes) -> None:
    """What is read can be written, and is then the same: nothing is taken that a save could not have meant."""
    manifest = decode_manifest(data)
    assert decode_manifest(encode_manifest(manifest)) == manifest


def change_tree(rng: Random, pool: Sequence[tuple[bytes, ...]]) -> bytes:
    own = len(pool) - len(PICKLES)  # those that can be read, first of all and as they grow
    ops = mutate_ops(rng, rng.choice(pool) if rng.random() < 0.4 else pool[rng.randrange(-own, 0)], pool)
    data = b"".join(ops)
    return mutate_bytes(rng, data) if rng.random() < 0.2 else data


def read_tree(data: bytes) -> None:
    decode_tree(data)


def change_card(rng: Random, pool: Sequence[list[str]]) -> bytes:
    """The lines of a card, with what YAML has and JSON has not: tags, anchors, merges, numbers to the base of 60."""
    lines = list(rng.choice(pool))
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, kind = rng.randrange(len(lines)), rng.randrange(6)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, rng.choice(rng.choice(pool)))
        elif kind == 2:
            lines.insert(at, rng.choice(_YAML))
        elif kind == 3:
            key, colon, _ = lines[at].partition(":")
            lines[at] = f"{key}{colon} {rng.choice(_YAML_VALUES)}"
        elif kind == 4:
            lines[at] = " " * rng.randrange(4) + lines[at].strip()
        else:
            lines[at] = lines[at].replace(":", f": {rng.choice(NAMES)[:40]} ", 1)
        lines = lines or [""]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, data) if rng.random() < 0.3 else data


_YAML_VALUES = (
    "!!python/object/apply:os.system ['true']",
    "!!python/object/apply:tests.hostile.watch.canary []",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!binary x",
    "!!timestamp x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!int x",
    "!!float x",
    "!<tag:yaml.org,2002:python/object:os.system> {}",
    "2001-99-99",
    "1:59:59:59",
    "0x" + "f" * 5000,
    "9" * 5000,
    ".nan",
    "*a",
    "&a [*a]",
    "&a {x: *a}",
    "[" * 200,
    "{? {b: 1} : 2}",
    "'",
    '"\\x"',
    '"\\ud800"',
    "|2",
    ">-",
    "%TAG",
    "null",
    "[]",
    "{}",
    "- 1",
    "3",
    "\x00",
    "\x85",
    "\ufeff",
)
_YAML = (
    "a: &a [1, 1, 1, 1]",
    "b: &b {x: 1, y: 2}",
    "c: {<<: *b}",
    "c: &b {<<: [*b, *b]}",
    "<<: *a",
    "? [1, 2]",
    "---",
    "...",
    "%YAML 9.9",
    "!!binary:",
    "num_shards: 2",
    "tokenizer_ref: x",
    "\tx: 1",
)
_CARD = [
    "name: n",
    "model_family: f",
    "model_config:",
    "  _set_:",
    "    a: 1",
    "    b: [1, 2, {c: d}]",
    "num_shards: 2",
]
_BOMB = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 9))]
_MERGES = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 9))]


def read_card(data: bytes) -> None:
    storage = MemoryObjects("run")
    storage.put(CARD, [data])
    read_model_card(storage)


def change_score(rng: Random, pool: Sequence[bytes]) -> bytes:
    return mutate_bytes(rng, rng.choice(pool), pool)


def read_score(data: bytes) -> None:
    number = decode_score(data)
    assert number == number


FORMATS = (
    Format("index", [_INDEX], change_index, read_index, (ValueError,), ("index", "placement", "checksum"), json.loads),
    Format(
        "record",
        [json.loads(DATA)],
        change_record,
        read_record,
        (ValueError,),
        ("manifest", "consistency", "index", "layout", "placement", "checksum"),
        json.loads,
    ),
    Format(
        "tree",
        [ops_of(data) for data in (*PICKLES, good(), IMAGE.tree, encode_tree({"a": [1, b"", (2.5, None)]}))],
        change_tree,
        read_tree,
        (ValueError,),
        ("machine", "allowed"),
        ops_of,
    ),
    Format(
        "card",
        [_CARD, [*_BOMB, *_CARD, "x: *a8"], [*_BOMB[:8], *_CARD[:2], "model_config: {_set_: *a7}"], [*_MERGES, *_CARD]],
        change_card,
        read_card,
        (CheckpointError,),
        ("card",),
        lambda data: data.decode("utf-8", "surrogatepass").split("\n"),
    ),
    Format("score", [b"0.25\n", b"-inf\n", b"1e308", b"1_0"], change_score, read_score, (ValueError,), ("scores",)),
)
