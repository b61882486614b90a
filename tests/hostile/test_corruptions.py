"""Stored bytes that are not what was written, anywhere, by any amount, or of another file: found by a load.

Padding, zip headers and the zip directory are read by nobody who loads, and are found all the same: the digest in the
record is of the whole file, and each file is summed up whole by the rank that looks after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.load import Loader
from shardckpt.format.manifest import decode_manifest
from shardckpt.gang.local import LocalGang
from shardckpt.run.catalog import Catalog
from shardckpt.storage.memory import MemoryObjects
from tests.scorecard import Scale, Scorecard

pytestmark = pytest.mark.crash
TIMEOUT = timedelta(seconds=60)
Objects = dict[str, bytes]


def state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    weights = {"w": torch.randn(9, 7), "empty": torch.zeros(0), "b": torch.randn(5).bfloat16()}
    return {"model": weights, "optimizer": {"m": torch.randn(9, 7)}, "progress": {"seen": seed, "losses": [0.5] * 3}}


@cache
def run(seed: int) -> Objects:
    """All objects of a run of its own with two steps, on an object store: each attempt has a folder of its own."""
    storage = MemoryObjects(f"run-{seed}")
    with sc.CheckpointManager(storage) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(10 * seed + step), metadata={"loss": 0.5}).result()
    return dict(storage._objects)


def step_of(objects: Objects, step: int) -> Objects:
    """The record and the files of a step, by what they are called whatever the attempt."""
    inside = f"step_{step}/"
    own = {key: content for key, content in objects.items() if key.startswith(inside)}
    return {key.rpartition("/")[2]: content for key, content in own.items()}


@cache
def attempt(step: int) -> str:
    return decode_manifest(step_of(run(0), step)["manifest.json"]).attempt


def key_of(name: str, step: int = 2) -> str:
    return f"step_{step}/manifest.json" if name == "manifest.json" else f"step_{step}/{attempt(step)}/{name}"


def load(objects: Objects) -> dict[str, Any]:
    """All of step 2, as a load on one rank reads it. `CheckpointError` for whatever is wrong."""
    storage = MemoryObjects("run")
    storage._objects.update(objects)
    folder, manifest = Catalog(storage).record(2)
    gang = LocalGang()
    gang.enter("load", timeout=TIMEOUT)
    at = Coordinates(0, 1, 0, 1, (0,))
    return Loader(storage, gang, at, folder=folder, manifest=manifest, timeout=TIMEOUT).load_everything()


CHECKERS: tuple[Callable[[Objects], Any], ...] = (load,)
"""Each must raise a `CheckpointError` for every corruption, and pass what is whole."""


@dataclass(frozen=True)
class Damage:
    """What is done to the file of this name of step 2."""

    name: str
    content: bytes | None
    """None: it is gone."""
    what: str

    def objects(self) -> Objects:
        changed = dict(run(0))
        if self.content is None:
            del changed[key_of(self.name)]
        else:
            changed[key_of(self.name)] = self.content
        return changed


def flips(rng: Random) -> Iterator[Damage]:
    """Every byte of every file, one bit of it, in no order."""
    places = [(name, at) for name, content in step_of(run(0), 2).items() for at in range(len(content))]
    rng.shuffle(places)
    for name, at in places:
        content = bytearray(step_of(run(0), 2)[name])
        content[at] ^= 1 << rng.randrange(8)
        yield Damage(name, bytes(content), f"bit flipped in byte {at}")


def truncations(rng: Random) -> Iterator[Damage]:
    """Every length that a file can be cut off to, and some bytes too many."""
    places = [(name, at) for name, content in step_of(run(0), 2).items() for at in range(len(content))]
    rng.shuffle(places)
    for number, (name, at) in enumerate(places):
        content = step_of(run(0), 2)[name]
        if number % 10 == 0:
            yield Damage(name, content + rng.randbytes(1 + at % 64), "bytes too many")
        yield Damage(name, content[:at], f"cut off at {at}")


def overwritten(rng: Random) -> Iterator[Damage]:
    """Stretches of zeros, of noise, or of another place, as a lost page or a torn write leaves them."""
    files = step_of(run(0), 2)
    while True:
        name = rng.choice(list(files))
        content = bytearray(files[name])
        at = rng.randrange(len(content))
        end = min(len(content), at + rng.choice((1, 16, 512, 4096)))
        other = rng.choice((bytes(end - at), rng.randbytes(end - at), bytes(content[: end - at])))
        content[at:end] = other
        if content != files[name]:
            yield Damage(name, bytes(content), f"bytes {at} to {end} are others")


def exchanged(rng: Random) -> Iterator[Damage]:
    """Files of the other step, of another run, of another name, and none: all there are."""
    here = step_of(run(0), 2)
    others = {"the other step": step_of(run(0), 1), "another run": step_of(run(1), 2), "this step": here}
    for name, content in here.items():
        yield Damage(name, None, "gone")
        for where, files in others.items():
            for other, stranger in files.items():
                # A whole record of another attempt names files of that attempt, which are not here.
                if stranger != content:
                    yield Damage(name, stranger, f"{other} of {where}")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "sample", "full"), [(flips, 120, 5_000), (truncations, 120, 6_000), (overwritten, 60, 2_000)]
)
def test_damage_is_found(
    kind: Callable[[Random], Iterator[Damage]], sample: int, full: int, scale: Scale, scorecard: Scorecard
) -> None:
    count(scorecard, list(islice(kind(Random(0)), scale.runs(sample=sample, full=full))))


def test_a_file_in_the_place_of_another_is_found(scorecard: Scorecard) -> None:
    damages = list(exchanged(Random(0)))
    assert len(damages) > 20
    count(scorecard, damages)


def count(scorecard: Scorecard, damages: list[Damage]) -> None:
    passed = [f"{check.__name__}: {d.name}, {d.what}" for check in CHECKERS for d in damages if not finds(check, d)]
    scorecard.add("corruptions", runs=len(damages), torn=len(passed), notes="found by load")
    assert damages
    assert not passed, passed[:10]


def finds(check: Callable[[Objects], Any], damage: Damage) -> bool:
    try:
        check(damage.objects())
    except sc.CheckpointError:
        return True
    return False


def test_what_is_whole_passes() -> None:
    expected = state(2)
    found = load(dict(run(0)))
    assert torch.equal(found["model"]["w"], expected["model"]["w"])
    assert torch.equal(found["optimizer"]["m"], expected["optimizer"]["m"])
    assert found["progress"] == expected["progress"]


def test_a_whole_step_in_the_place_of_another_is_refused() -> None:
    """Every file and the record of step 1, under the name of step 2: digests agree, and it is the wrong step."""
    own = {key: content for key, content in run(0).items() if key.startswith("step_1/")}
    objects = {key.replace("step_1/", "step_2/"): content for key, content in own.items()}
    with pytest.raises(sc.CheckpointDamagedError, match="renamed or copied"):
        load(objects)


def save_sharded(rank: int, world_size: int, folder: Path, root: Path) -> None:
    """One step, with values that each rank has of its own."""
    with sc.CheckpointManager(root) as checkpoints:
        state = {"model": {"w": torch.ones(4, 4)}, "own": {"rank": rank, "x": torch.full((3,), rank)}}
        checkpoints.save(1, state).result()


def load_each(rank: int, world_size: int, folder: Path, root: Path) -> str:
    state = {"model": {"w": torch.zeros(4, 4)}, "own": {"rank": -1, "x": torch.zeros(3, dtype=torch.int64)}}
    with sc.CheckpointManager(root) as checkpoints:
        try:
            checkpoints.load(1, state)
        except sc.CheckpointError as error:
            return f"{type(error).__name__}: {error}"
    return f"loaded {state['own']['rank']}"


def test_files_of_two_ranks_exchanged(ranks: Any, tmp_path: Path) -> None:
    ranks.run(2, save_sharded, tmp_path / "run")
    assert ranks.run(2, load_each, tmp_path / "run") == ["loaded 0", "loaded 1"]
    one, other = (tmp_path / "run" / "step_1" / f"rank_{rank}.pt" for rank in (0, 1))
    assert one.stat().st_size == other.stat().st_size, "or the size alone would tell"
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    for told in ranks.run(2, load_each, tmp_path / "run"):
        assert told.startswith("CheckpointDamagedError"), told
