"""How the checkpoints of this package are read after a crash, and how a job goes on from what it left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch

import shardckpt as sc
from shardckpt.format.checksum import crc32
from shardckpt.format.layout import BLOBS, parse_aside
from shardckpt.run.catalog import Catalog
from shardckpt.run.deletion import delete_step
from shardckpt.run.leftovers import DeadAttempts, sweep
from shardckpt.run.shared.sweeping import sweep_blobs
from shardckpt.storage.base import Storage
from shardckpt.testing.crash.judge import Finding, Remembering
from shardckpt.testing.crash.operations import Allowed
from shardckpt.testing.gangs import RanksError, run_ranks

LIMIT = timedelta(seconds=60)
FOREIGN: Mapping[str, bytes] = {
    "step_7.bak/weights.bin": b"of somebody else",
    "step_8/pytorch_model.bin": b"another program's step",
    "notes/todo.txt": b"ours are not yours",
    "step_00003/rank_0.pt": b"not spelled as ours",
}
"""Put into the root before anything else, and never to be touched."""
NEXT = 900
"""The version that is saved after a crash."""


def make_state(rank: int, version: int, *, width: int = 600) -> dict[str, Any]:
    """A part that all ranks hold alike, one of this rank, and values; no two versions have a tensor in common."""
    model = {"weight": torch.arange(float(width)) + 1000 * version, "bias": torch.full((3,), version)}
    return {"model": model, "own": {"position": torch.tensor([10 * version + rank])}, "value": [rank, version]}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one["value"] == other["value"] and all(
        torch.equal(value, other[part][key]) for part in ("model", "own") for key, value in one[part].items()
    )


def rebuilt(version: int) -> str:
    """That version, when its record is not the one that was written with it."""
    return f"{version}, rebuilt"


class OurReader:
    """A `Reader`: the catalog, and a load by as many ranks as have saved."""

    def __init__(self, ranks: int, *, width: int = 600, sums: bool = True) -> None:
        """`sums`: whether files are summed up here, too; else only the load looks at what it reads."""
        self._ranks = ranks
        self._sums = sums
        self._width = width

    def steps(self, storage: Storage) -> list[int]:
        return Catalog(storage).steps()

    def version(self, storage: Storage, step: int) -> object:
        folder, manifest = Catalog(storage).record(step)
        for file in manifest.files:
            content = storage.read(file.key_in(folder))
            if self._sums and (len(content), crc32(content)) != (file.nbytes, file.crc):
                raise ValueError(f"{file.name} is not what the record says")
        if manifest.model_only:
            model = make_state(0, 0, width=self._width)["model"]
            with sc.CheckpointManager(storage, sc.Gangs.local(), timeout=LIMIT) as manager:
                manager.load(step, {"model": model})
            return "model", self._whole(int(model["bias"][0]), [{"model": model}])
        loaded = load_on_ranks(storage, step, self._ranks, width=self._width)
        version = self._whole(int(loaded[0]["value"][1]), loaded)
        return rebuilt(version) if "rebuilt" in manifest.metadata else version

    def _whole(self, version: int, states: list[dict[str, Any]]) -> int:
        for rank, state in enumerate(states):
            if not same(
                {"own": {}, "value": 0, **state}, {**make_state(rank, version, width=self._width), **_rest(state)}
            ):
                raise ValueError(f"a mixture: {state}")
        return version


def _rest(state: Mapping[str, Any]) -> dict[str, Any]:
    return {} if "value" in state else {"own": {}, "value": 0}


def load_on_ranks(storage: Storage, step: int, ranks: int, *, width: int) -> list[dict[str, Any]]:
    def load(gangs: sc.Gangs) -> dict[str, Any]:
        state = make_state(0, 0, width=width)
        with sc.CheckpointManager(storage, gangs, timeout=LIMIT) as manager:
            manager.load(step, state)
        return state

    try:
        return run_ranks(ranks, load)
    except RanksError as error:  # told on every rank, as it should be, or something else on some
        kinds = {type(each) for each in error.errors.values()}
        if kinds == {sc.CheckpointDamagedError} and len(error.errors) == ranks:
            raise error.errors[0] from None
        raise


def reader_of(ranks: int, *, width: int = 600, sums: bool = True) -> Remembering:
    """That reader, which reads a step again only if anything in its folder, or among the blobs, differs."""
    return Remembering(
        OurReader(ranks, width=width, sums=sums),
        lambda storage, step: Catalog(storage).entry(step).folder,
        beside=BLOBS,
    )


def recover(
    storage: Storage,
    allowed: Allowed,
    reader: Remembering,
    *,
    width: int = 600,
    late: Iterable[Callable[[], None]] = (),
) -> list[Finding]:
    """A new process of one rank: resumes, saves the next step, saves the newest one again, sweeps what is dead.

    All that was offered before must be offered afterwards, with the same content; nothing of others may be touched.
    `late`: what may still happen from outside, after the resume.
    """
    foreign = {key: storage.read(key) for key in FOREIGN if _is_there(storage, key)}
    before = {step: reader.version(storage, step) for step in reader.steps(storage)}
    findings: list[Finding] = []
    newest = max((step for step, version in before.items() if not isinstance(version, tuple)), default=0)
    with sc.CheckpointManager(storage, sc.Gangs.local(), timeout=LIMIT) as manager:
        policy = sc.LoadPolicy(unexpected="ignore")
        state = {"model": make_state(0, 0, width=width)["model"]} if before else make_state(0, 0, width=width)
        resumed = manager.resume(state, policy=policy)
        found = resumed.step if resumed is not None else 0
        if found != max(before, default=0) or (resumed is not None and resumed.skipped):
            findings.append(
                Finding("lost", newest, f"resumed from {found} ({resumed}), and {sorted(before)} are there")
            )
        for act in late:
            act()
        following = max(before, default=0) + 1
        manager.save(following, make_state(0, NEXT), replicated=("model",)).result()
        if newest:
            manager.save(newest, make_state(0, NEXT), replicated=("model",)).result()
        again = _refer_again(manager, storage, following + 1)
    tidy(storage)
    after = {
        **{step: frozenset({version}) for step, version in before.items()},
        following: frozenset({NEXT}),
    } | again
    if newest:
        after[newest] = frozenset({NEXT})
    one = OurReader(1)
    for step, versions in after.items():
        own = NEXT in versions or step > following
        read = one if own else reader
        if None in allowed.get(step, frozenset()) and not own:
            continue  # a deletion of it was under way, and may come to its end
        if step not in read.steps(storage) or read.version(storage, step) not in versions:
            findings.append(Finding("lost", step, f"after the next save and a sweep it is not {versions}"))
    findings += [Finding("outside", 0, key) for key, content in foreign.items() if not _is_there(storage, key, content)]
    left = [name for name in storage.list() if (aside := parse_aside(name)) and aside.kind == "tmp"]
    return findings + [Finding("outside", 0, f"{name} stays for ever") for name in left]


def delete_newest(storage: Storage, reader: Remembering) -> list[Finding]:
    """A new process deletes the newest step first. What then lies under its number is whole, or nothing does."""
    newest = Catalog(storage).latest()
    if newest is None:
        return []
    delete_step(storage, newest)
    steps = reader.steps(storage)
    if newest.step in steps:
        try:
            reader.version(storage, newest.step)
        except Exception as error:
            return [Finding("torn", newest.step, f"after its deletion {type(error).__name__}: {error}")]
    return []


def tidy(storage: Storage) -> None:
    """What managers do in the hours after commits, at once: attempts that do not move are dead."""
    dead = DeadAttempts(Catalog(storage), grace=timedelta(0))
    for _ in range(2):
        dead.tidy()
    sweep(Catalog(storage), own_attempts={})
    sweep_blobs(storage)


def _refer_again(manager: sc.CheckpointManager, storage: Storage, step: int) -> dict[int, frozenset[object]]:
    """Save what the job that died had saved with blobs, one after the other: what it left is referred to again, if it
    is whole. Gives what is to be found then."""
    versions = (1, 2) if storage.list(BLOBS) else ()
    for number, version in enumerate(versions):
        manager.save(step + number, make_state(0, version), replicated=("model",), frozen=("model",)).result()
    return {step + number: frozenset({version}) for number, version in enumerate(versions)}


def _is_there(storage: Storage, key: str, content: bytes | None = None) -> bool:
    try:
        return content is None or storage.read(key) == content if storage.size(key) >= 0 else False
    except FileNotFoundError:
        return False


def structure(files: Mapping[str, bytes], folders: frozenset[str], offered: Iterable[str]) -> object:
    """What a recovery depends on: names and sizes, and contents of records, scores and offered folders. Of other files
    no byte is read."""
    whole = tuple(f"run/{folder}/" for folder in offered)
    return folders, frozenset(
        (path, content if path.startswith(whole) or not path.endswith(".pt") else len(content))
        for path, content in files.items()
    )
