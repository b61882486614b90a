"""Files changed at random and with intent: an error of ours or a value, soon, in little memory, and nothing else.

python -m pytest tests/hostile -m crash --scale full -n 2      a million cases of each format
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import watch
from tests.hostile.attacks import PICKLES
from tests.hostile.checkpoints import CHECKPOINTS
from tests.hostile.foreign import FOREIGN
from tests.hostile.formats import FORMATS, Format
from tests.hostile.fuzzing import fuzz
from tests.hostile.watch import bounded_memory, watching
from tests.scorecard import Scale, Scorecard

pytestmark = pytest.mark.crash
PARTS = 4
"""Of each format, for the workers of xdist to share."""


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("form", [*FORMATS, *CHECKPOINTS], ids=lambda form: form.name)
def test_cases_of(form: Format, part: int, scale: Scale, scorecard: Scorecard) -> None:
    cases = scale.runs(sample=2_000, full=1_000_000) // PARTS
    outcome = fuzz(form, cases, seed=part)
    hangs = sum("hangs" in failure for failure in outcome.failures)
    row = f"fuzzed files: {form.name}"
    scorecard.add(row, runs=cases, hangs=hangs, code=outcome.ran, outside=len(outcome.touched))
    assert not outcome.failures, "\n".join(outcome.failures)
    assert not outcome.ran, "code of a file was run"
    assert not outcome.touched, outcome.touched[:5]
    assert cases < 100 or outcome.read, "every case was refused: the changes are too coarse"
    assert cases < 100 or outcome.refused


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("form", FOREIGN, ids=lambda form: form.name)
def test_cases_of_what_others_write(form: Format, scale: Scale, scorecard: Scorecard) -> None:
    outcome = fuzz(form, scale.runs(sample=1_000, full=1_000_000), seed=1)
    runs = outcome.read + outcome.refused + len(outcome.failures)
    hangs = sum("hangs" in failure for failure in outcome.failures)
    scorecard.add(f"fuzzed files: {form.name}", runs=runs, hangs=hangs, code=outcome.ran, outside=len(outcome.touched))
    assert not outcome.failures, "\n".join(outcome.failures)
    assert not outcome.ran, "code of a file was run"
    assert not outcome.touched, outcome.touched[:5]
    assert outcome.read > 10, "every case was refused: the changes are too coarse"
    assert outcome.refused > 10


def read_with(work: Any, errors: tuple[type[Exception], ...] = (ValueError,)) -> Format:
    return Format("planted", [b"seed"], lambda rng, pool: rng.randbytes(4), work, errors, ("test_fuzz",))


def run_pickle(data: bytes) -> None:
    pickle.loads(PICKLES[-6])


def raise_key_error(data: bytes) -> None:
    raise KeyError("x")


def take_memory(data: bytes) -> None:
    try:
        bytearray(3 << 30)  # more than the limit, and never touched
    except MemoryError as error:
        raise ValueError("not well-formed") from error


def grow(data: bytes) -> None:
    _kept.append(b"x" * (400 << 20)) if not _kept else None
    raise ValueError


def shout(data: bytes) -> None:
    raise ValueError("x" * 100_000)


def open_outside(data: bytes) -> None:
    with open("/etc/hostname", "rb"), pytest.raises(ValueError, match="x"):
        raise ValueError("x")


_kept: list[bytes] = []


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (run_pickle, "code"),
        (raise_key_error, "KeyError"),
        (take_memory, "ValueError of"),
        (grow, "memory grew"),
        (shout, "100000 letters"),
        (open_outside, "/etc/hostname"),
    ],
)
def test_the_loop_finds_what_is_planted(work: Any, said: str) -> None:
    outcome = fuzz(read_with(work), 10, seed=0)
    _kept.clear()
    found = [*outcome.failures, *outcome.touched, *["code was run"] * outcome.ran]
    assert any(said in failure for failure in found), found


def test_cases_follow_from_the_seed_and_seeds_grow() -> None:
    form = FORMATS[0]
    one, other, third = (fuzz(form, 400, seed=seed, growth=0.5) for seed in (1, 1, 2))
    assert (one.read, one.refused, one.grown) == (other.read, other.refused, other.grown)
    assert (one.read, one.grown) != (third.read, third.grown)
    assert one.grown > 5


def test_the_watch_sees_what_leaves_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(b"x")
    with watching(tmp_path / "in") as seen:
        (tmp_path / "in" / "file").read_bytes()
    assert not seen.noticed
    with watching(tmp_path / "in") as seen, pytest.raises(FileNotFoundError):
        (tmp_path / "out").read_bytes()
    assert seen.noticed
    with bounded_memory() as grown, pytest.raises(MemoryError):
        bytearray(watch.ROOM + (1 << 30))
    assert grown() < 64 << 20


def test_every_attack_is_refused_or_harmless() -> None:
    tree = next(form for form in FORMATS if form.name == "tree")
    with watching() as seen:
        for attack in PICKLES:
            try:
                tree.read(attack)
            except ValueError:
                continue
    assert not seen.ran
    assert not seen.noticed
