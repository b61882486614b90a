"""Stored bytes that are not what was written: found before anything is changed, whatever and wherever they are."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shardckpt as sc
from shardckpt.format.manifest import decode_manifest, encode_manifest
from tests.engine.states import assert_same, snapshot, train, training


@pytest.fixture
def root(tmp_path: Path) -> Path:
    state = training()
    train(state, 1)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state).result()
        train(state, 1)
        checkpoints.save(2, state).result()
    return tmp_path


def refuses(root: Path) -> str:
    """Loading step 2 fails and changes nothing; `resume` goes back to step 1 and says why. Gives the reason."""
    state = training(seed=4)
    train(state, 1)
    before = snapshot(state)
    with sc.CheckpointManager(root) as checkpoints:
        with pytest.raises(sc.CheckpointLoadError) as caught:
            checkpoints.load(2, state)
        assert caught.value.step == 2
        assert_same(before, snapshot(state))
        info = checkpoints.resume(state)
    assert info is not None
    assert info.step == 1
    assert [step for step, _ in info.skipped] == [2]
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.pt", "rank_0.pt", "manifest.json"])
def test_a_flipped_byte_anywhere(root: Path, name: str) -> None:
    """A sample of all bytes: the edges, and some of every kilobyte-ish stretch. Headers and padding count too."""
    file = root / "step_2" / name
    good = file.read_bytes()
    rng = random.Random(0)
    positions = [0, 1, 64, min(4095, len(good) - 2), len(good) - 1, len(good) - 30, *rng.sample(range(len(good)), 25)]
    state = training(seed=4)
    with sc.CheckpointManager(root) as checkpoints:
        for position in positions:
            bad = bytearray(good)
            bad[position] ^= 1 << rng.randrange(8)
            file.write_bytes(bad)
            with pytest.raises(sc.CheckpointDamagedError):
                checkpoints.load(2, state)
        file.write_bytes(good)
        checkpoints.load(2, state)


@pytest.mark.parametrize("name", ["model.pt", "rank_0.pt", "manifest.json"])
@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_a_truncated_file(root: Path, name: str, keep: float) -> None:
    file = root / "step_2" / name
    nbytes = file.stat().st_size
    os.truncate(file, nbytes - 1 if keep == -1 else int(nbytes * keep) if keep < 1 else 1)
    refuses(root)


@pytest.mark.parametrize("name", ["model.pt", "rank_0.pt"])
def test_a_removed_file(root: Path, name: str) -> None:
    (root / "step_2" / name).unlink()
    assert name in refuses(root)


def test_a_removed_record_is_no_checkpoint(root: Path) -> None:
    (root / "step_2" / "manifest.json").unlink()
    with sc.CheckpointManager(root) as checkpoints:
        assert checkpoints.steps() == [1]
        with pytest.raises(sc.CheckpointNotFoundError):
            checkpoints.load(2, training())


def test_a_file_of_another_step(root: Path) -> None:
    (root / "step_2" / "rank_0.pt").write_bytes((root / "step_1" / "rank_0.pt").read_bytes())
    refuses(root)


@pytest.mark.parametrize("name", ["../x", "../step_1/model.pt", "/etc/passwd", "a/../../x", "C:\\x", "a\\b", ""])
def test_a_record_that_points_outside(root: Path, name: str) -> None:
    edit(root, lambda record: record["files"][0].update(name=name))
    refuses(root)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(format=99),
        lambda r: r["files"].pop(),
        lambda r: r["files"][0].update(nbytes=2**63),
        lambda r: r["files"][0].update(crc32="zz"),
        lambda r: r["files"][0]["index"].__setitem__(1, 10**12),
        lambda r: r["tables"][0]["tensors"]["layout"].__setitem__(0, 7),
        lambda r: r["tables"][0]["tensors"]["dtype"].__setitem__(0, "object"),
        lambda r: r.pop("tables"),
        lambda r: r.update(shard_of=[[0, 0, 10**12]]),
    ],
    ids=["format", "file", "size", "crc", "extent", "layout", "dtype", "tables", "ranks"],
)
def test_a_record_that_lies(root: Path, change: Callable[[dict], object]) -> None:
    edit(root, change)
    refuses(root)


def edit(root: Path, change: Callable[[dict], object]) -> None:
    """Change step 2's record and give it a digest that agrees, as an attacker would."""
    import hashlib

    path = root / "step_2" / "manifest.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    change(record)
    body = json.dumps(record)[:-1] + ",\n"
    path.write_text(f'{body}"sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n')


class Attack:
    def __reduce__(self) -> tuple:
        return os.system, (f"touch {os.environ['CANARY']}",)


def test_a_pickle_that_would_run_code(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted with every digest made to agree: only the restricted unpickler stands between it and us."""
    import pickle

    canary = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(canary))
    path = root / "step_2" / "manifest.json"
    manifest = decode_manifest(path.read_bytes())
    plant(root / "step_2" / "rank_0.pt", manifest, pickle.dumps({"progress": Attack()}, protocol=2), path)
    assert "not a well-formed" in refuses(root)
    assert not canary.exists()


def plant(file: Path, manifest: object, attack: bytes, record: Path) -> None:
    from dataclasses import replace

    from shardckpt.format.checksum import crc32

    content = bytearray(file.read_bytes())
    entry = next(e for e in manifest.files if e.name == file.name)  # type: ignore[attr-defined]
    at, nbytes, _ = entry.tree
    assert len(attack) <= nbytes
    content[at : at + len(attack)] = attack
    file.write_bytes(content)
    changed = replace(entry, crc=crc32(bytes(content)), tree=(at, len(attack), crc32(attack)))
    files = tuple(changed if e is entry else e for e in manifest.files)  # type: ignore[attr-defined]
    record.write_bytes(encode_manifest(replace(manifest, files=files)))  # type: ignore[type-var]


def test_no_good_step_is_no_silent_fresh_start(root: Path) -> None:
    for step in (1, 2):
        (root / f"step_{step}" / "model.pt").unlink()
    with sc.CheckpointManager(root) as checkpoints:
        state = training()
        with pytest.raises(sc.CheckpointLoadError, match=r"step 2: .*\n.*step 1: ") as caught:
            checkpoints.resume(state)
        assert "allow_fresh_start" in str(caught.value)
        assert checkpoints.resume(state, allow_fresh_start=True) is None


def test_other_things_in_the_root_are_left_alone(root: Path) -> None:
    for name in ("step_07", "step_x", "notes", "step_5.tmp", "step_9"):
        (root / name).mkdir()
        (root / name / "file").write_text("mine")
    with sc.CheckpointManager(root) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        state = training()
        checkpoints.save(3, state).result()
        checkpoints.save(9, state).result()
        assert checkpoints.steps() == [1, 2, 3, 9]
    texts = [path for path in root.rglob("file") if path.read_text() == "mine"]
    assert len(texts) == 5
    assert torch.load(root / "step_9" / "model.pt", weights_only=True)["model_key"] == "model"
