"""Modes follow the umask; names of any letters, any case and any length are kept apart, or refused with a reason."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shardckpt as sc
from tests.hostile.watch import watching

NAMES = [
    "plain",
    "Plain",
    "PLAIN",
    "caf\u00e9",
    "cafe\u0301",
    "\u0130stanbul",
    "\u202egnp.exe",
    "\U0001f600" * 3,
    "a b\tc",
    "line\nbreak",
    "../../up",
    "/etc/passwd",
    "C:\\x",
    "con",
    "nul\0l",
    "quote\"'`$(touch x)",
    "n" * 255,
    "m" * 5000,
    "%s%n{0}",
]


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027], indirect=True, ids=oct)
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    root = tmp_path / "run"
    with sc.CheckpointManager(root) as checkpoints:
        checkpoints.save_model_metadata("f", {"a": 1})
        checkpoints.save(1, {"w": torch.ones(300, 300)}).result()
        checkpoints.save(1, {"w": torch.zeros(300, 300)}).result()
        checkpoints.save_score(0.5, step=1)
    found = [root, *root.rglob("*")]
    assert {path.name for path in found} >= {"rank_0.pt", "manifest.json", "score.txt", "model.yaml"} or len(found) > 4
    for path in found:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, f"{path.name}: {mode:o}"


@pytest.mark.parametrize("parts", [False, True], ids=["keys", "parts"])
def test_names_of_the_state_are_told_apart(tmp_path: Path, parts: bool) -> None:
    """Names of tensors never become names of files."""
    root = tmp_path / "run"
    saved = {name: torch.full((3,), number) for number, name in enumerate(NAMES)}
    blank = {name: torch.zeros(3, dtype=torch.int64) for name in NAMES}
    with sc.CheckpointManager(root) as checkpoints, watching(tmp_path) as seen:
        checkpoints.save(1, dict(saved) if parts else {"model": dict(saved)}).result()
        checkpoints.load(1, dict(blank) if parts else {"model": dict(blank)})
    assert all(torch.equal(blank[name], saved[name]) for name in NAMES)
    assert not [event for event in seen.noticed if event.startswith("open(") and str(tmp_path) not in event], (
        seen.noticed
    )
    assert {path.name for path in root.rglob("*") if path.is_file()} <= {"model.pt", "rank_0.pt", "manifest.json"}
    opened = torch.load(next(root.rglob("*.pt")), weights_only=True)
    assert len(opened) > 0


@pytest.mark.parametrize(
    "name", ["run", "RUN", "caf\u00e9", "cafe\u0301", "\U0001f600", "a b", "x" * 255, "-rf", "a%20b", "#1?"]
)
def test_a_run_may_have_any_name_of_a_folder(tmp_path: Path, name: str) -> None:
    for neighbour in ("run", "RUN", "caf\u00e9"):  # the last in another form than that above
        (tmp_path / neighbour).mkdir(exist_ok=True)
    with sc.CheckpointManager(tmp_path / name) as checkpoints:
        checkpoints.save(1, {"w": torch.ones(3)}).result()
        assert checkpoints.steps() == [1]
    assert [path.name for path in tmp_path.iterdir() if any(path.iterdir())] == [name]


def test_a_name_that_no_file_system_takes_is_an_error_of_ours(tmp_path: Path) -> None:
    with sc.CheckpointManager(tmp_path / ("x" * 256)) as checkpoints:
        with pytest.raises(sc.CheckpointError, match=r"too long|name"):
            checkpoints.save(1, {"w": torch.ones(3)}).result()
        with pytest.raises(sc.CheckpointError, match=r"too long|name"):
            checkpoints.steps()
    assert not list(tmp_path.iterdir())


def test_a_name_with_half_a_letter_is_kept_or_refused(tmp_path: Path) -> None:
    """A lone surrogate is no text, but Python has such names."""
    state = {"model": {"\ud800": torch.ones(2)}}
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state).result()
        state["model"]["\ud800"].zero_()
        checkpoints.load(1, state)
    assert state["model"]["\ud800"].tolist() == [1, 1]


def test_steps_in_other_letters_or_of_strange_names_are_foreign(tmp_path: Path) -> None:
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": torch.ones(3)}).result()
        for name in (
            "STEP_2",
            "Step_1",
            "step_\u0661",
            "step_1 ",
            "step_1.",
            "step_01",
            "step_+3",
            "step_1\n",
            "s" * 255,
        ):
            (tmp_path / name).mkdir()
            (tmp_path / name / "manifest.json").write_bytes((tmp_path / "step_1" / "manifest.json").read_bytes())
        (tmp_path / "step_9").symlink_to("/etc")
        assert checkpoints.steps() == [1]
        assert checkpoints.load(1, {"w": torch.zeros(3)}) is not None
