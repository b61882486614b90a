"""Verify: sound ones pass; whatever is changed, missing or put in another's place is found, and named."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

import shardckpt as sc
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.posix.map import MappedFile
from shardckpt.testing.faults import CountingStorage, FailingStorage, TornStorage, flip_byte, on, truncate
from shardckpt.tools.checking import summing
from shardckpt.tools.checking.summing import Stretch, sums
from tests.manager.transactions import Size
from tests.run.making import start_attempt, walk
from tests.scorecard import Scale
from tests.tools.making import save, save_on, small_state


@pytest.fixture(params=["file system", "object store"], ids=str)
def storage(request: pytest.FixtureRequest) -> Storage:
    return MemoryStorage("run") if request.param == "file system" else MemoryObjects("run")


def only(report: sc.RunReport) -> sc.StepReport:
    (step,) = report.steps
    return step


def test_a_sound_step_is_complete_and_every_byte_of_it_was_read(storage: Storage) -> None:
    save(storage, 7)
    counting = CountingStorage(storage)
    report = sc.verify(counting)
    step = only(report)
    assert report.ok
    assert (step.step, step.standing, step.verdict, step.problems, step.notes) == (7, "committed", "COMPLETE", (), ())
    assert step.parts == {p: p in ("model", "optimizer", "rng") for p in step.parts}
    files = {key: storage.size(key) for key in walk(storage) if key.endswith(".pt")}
    assert {key: counting.nbytes[key] for key in files} == files
    assert step.checked_nbytes == step.nbytes == sum(files.values())
    assert step.world_size == 1


def test_quick_reads_no_file_and_still_finds_what_is_missing_or_cut_off(tmp_path: Path) -> None:
    save(tmp_path, 1)
    counting = CountingStorage(LocalStorage(tmp_path))
    assert sc.verify(counting, quick=True).ok
    assert set(counting.nbytes) == {"step_1/manifest.json"}
    truncate(tmp_path / "step_1/rank_0.pt", 100)
    (tmp_path / "step_1/model.pt").unlink()
    said = [str(problem) for problem in only(sc.verify(tmp_path, quick=True)).problems]
    assert said[0] == "model.pt: is missing"
    assert "has 100 bytes, but" in said[1]


def test_every_single_flipped_byte_is_found(storage: Storage) -> None:
    """All of them: of the record, of headers and padding, tensors, indexes, nestings and directories.

    On an object store the way is the same but for names: every seventh.
    """
    save(storage, 1)
    torn, tried = TornStorage(storage), 0
    for key in walk(storage):
        for at in range(0, storage.size(key), 1 if isinstance(storage, MemoryStorage) else 7):
            torn.tear(key, flip=at)
            step = only(sc.verify(torn))
            assert step.verdict == "DAMAGED", f"{key} byte {at}"
            assert key.endswith(step.problems[0].file), f"{key} byte {at}: {step.problems}"
            torn.mend()
            tried += 1
    assert tried > (3000 if isinstance(storage, MemoryStorage) else 400)


def test_every_flipped_byte_of_an_attempt_without_a_record_is_found(tmp_path: Path) -> None:
    """Our archives follow from their index to the last byte. Sampled: each costs a directory of a zip."""
    save(tmp_path, 1)
    (tmp_path / "step_1/manifest.json").unlink()
    (tmp_path / "step_1/model.pt").unlink()
    torn = TornStorage(LocalStorage(tmp_path))
    assert only(sc.verify(torn)).verdict == "PARTIAL"
    for at in range(0, torn.size("step_1/rank_0.pt"), 5):
        torn.tear("step_1/rank_0.pt", flip=at)
        assert only(sc.verify(torn)).verdict == "DAMAGED", f"byte {at}"
        torn.mend()


def test_all_damaged_files_are_named_with_their_tensors(tmp_path: Path) -> None:
    save_on(Size(2), tmp_path, 1)
    content = (tmp_path / "step_1/model.pt").read_bytes()
    bias = torch.full((3,), 1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    flip_byte(tmp_path / "step_1/model.pt", content.index(bias))
    flip_byte(tmp_path / "step_1/rank_1.pt", -1)
    flip_byte(tmp_path / "step_1/rank_0.pt", (tmp_path / "step_1/rank_0.pt").read_bytes().index(b"betas"))
    problems = only(sc.verify(tmp_path)).problems
    assert [problem.file for problem in problems] == ["model.pt", "rank_0.pt", "rank_1.pt"]
    assert problems[0].tensors == ("model.layer.bias",)
    assert "Python values" in problems[1].what
    assert "headers or padding" in problems[2].what


@pytest.mark.parametrize("other", ["step_1/rank_1.pt", "step_2/rank_0.pt", "other/step_1/rank_0.pt"])
def test_the_file_of_another_rank_step_or_run_is_found(tmp_path: Path, other: str) -> None:
    save_on(Size(2), tmp_path, 1, 2)
    save_on(Size(2), tmp_path / "other", 1)
    if other.startswith("other"):
        flip_byte(tmp_path / other, 1000)  # the same state was saved: as if by another run, it differs somewhere
    shutil.copyfile(tmp_path / other, tmp_path / "step_1/rank_0.pt")
    report = only(sc.verify(tmp_path, step=1))
    assert [problem.file for problem in report.problems] == ["rank_0.pt"]


def test_the_record_of_another_step_is_found(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    shutil.copyfile(tmp_path / "step_1/manifest.json", tmp_path / "step_2/manifest.json")
    said = only(sc.verify(tmp_path, step=2)).problems[0]
    assert said.file == "manifest.json"
    assert "this is the record of step 1" in said.what


def test_what_never_was_committed_is_said_to_be_so_and_is_no_damage(storage: Storage) -> None:
    save(storage, 1)
    folder = start_attempt(storage, 2, "00000000aa", {"rank_0.pt": b"PK cut off"})
    report = sc.verify(storage)
    assert report.ok
    left = report.steps[1]
    assert (left.step, left.folder, left.standing, left.verdict) == (2, folder, "uncommitted", "DAMAGED")
    assert "not committed: it has no record" in left.notes[0]
    assert [s.step for s in sc.verify(storage, step=2).steps] == [2]


def test_a_step_of_the_model_alone_is_partial(tmp_path: Path) -> None:
    with sc.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": small_state(1)["model"]}).result()
    step = only(sc.verify(tmp_path))
    assert (step.verdict, step.parts["model"], step.parts["rng"]) == ("PARTIAL", True, False)


def test_files_that_nobody_names_are_noted(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_1/notes.txt").write_text("mine")
    assert only(sc.verify(tmp_path)).notes == ("the record does not name notes.txt",)


def test_checkpoints_of_others_are_checked_by_their_own_checksums(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-5"
    foreign.mkdir()
    torch.save({"weight": torch.arange(4000.0)}, foreign / "pytorch_model.bin")
    torch.save({"state": torch.arange(40.0)}, foreign / "optimizer.pt")
    torch.save({"old": torch.zeros(3)}, foreign / "rng_state.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(foreign / "scheduler.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", b"x" * 100000)
    (foreign / "config.json").write_text("{}")
    step = only(sc.verify(tmp_path))
    assert (step.folder, step.standing, step.verdict) == ("checkpoint-5", "foreign", "COMPLETE")
    assert step.parts == {part: part not in ("data", "progress") for part in step.parts}
    assert "rng_state.pth is no zip archive" in step.notes[0]
    numbers = torch.arange(40.0).numpy().tobytes()
    inside = (foreign / "optimizer.pt").read_bytes().index(numbers)
    for name, at in (("pytorch_model.bin", 8000), ("optimizer.pt", inside), ("scheduler.pt", 60)):
        flip_byte(foreign / name, at)
    problems = only(sc.verify(foreign)).problems
    assert {problem.file for problem in problems} == {"pytorch_model.bin", "optimizer.pt", "scheduler.pt"}
    assert "data/0" in next(problem.what for problem in problems if problem.file == "pytorch_model.bin")
    truncate(foreign / "optimizer.pt", 400)
    assert not sc.verify(foreign / "optimizer.pt").ok


def test_a_safetensors_file_is_checked_as_far_as_that_goes(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(content)
    step = only(sc.verify(tmp_path))
    assert (step.verdict, step.parts["model"]) == ("PARTIAL", True)
    assert "no checksums" in step.notes[0]
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    assert "should have" in only(sc.verify(tmp_path)).problems[0].what


def test_a_place_that_cannot_be_read_is_no_damage(tmp_path: Path) -> None:
    save(tmp_path, 1)
    failing = FailingStorage(LocalStorage(tmp_path), on("list"), error=lambda: PermissionError("no entry"))
    with pytest.raises(sc.CheckpointLoadError, match="no entry"):
        sc.verify(failing)
    with pytest.raises(sc.CheckpointNotFoundError, match="nothing at"):
        sc.verify(tmp_path / "none")
    with pytest.raises(sc.CheckpointNotFoundError, match="no trace of step 5"):
        sc.verify(tmp_path, step=5)


def test_sums_are_right_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long stretches are cut, short ones go together; what cannot be read ends only itself."""
    from zlib import crc32

    monkeypatch.setattr(summing, "_LOCAL", summing._Pace(2, 10))
    storage, content = MemoryStorage(), bytes(range(100))
    storage.put("a", [content])
    cuts = [(0, 100), (3, 1), (7, 2), (9, 0), (20, 33), (90, 20), (1, 9)]
    found = sums(storage, [Stretch("a", at, nbytes) for at, nbytes in cuts] + [Stretch("b", 0, 5)])
    for (at, nbytes), crc in zip(cuts, found, strict=False):
        if at + nbytes <= 100:
            assert crc == crc32(content[at : at + nbytes])
        else:
            assert isinstance(crc, EOFError)
    assert isinstance(found[-1], FileNotFoundError)


@pytest.mark.parametrize("cached", [True, False])
def test_sampled_flipped_bytes_of_a_large_step_are_found(
    tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch, scale: Scale
) -> None:
    """Summed up where they lie, as far as the page cache has them, or read."""
    seen: list[bool] = []
    plain = summing._sum_in_place
    monkeypatch.setattr(summing, "_sum_in_place", lambda *given: (seen.append(plain(*given)), seen[-1])[1])
    if not cached:
        monkeypatch.setattr(MappedFile, "is_here", lambda *_: False)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": {"w": torch.rand(2_500_000), "v": torch.rand(3)}}).result()
    file = tmp_path / "step_1/model.pt"
    size = len(file.read_bytes())  # and now it is in the page cache
    dice = random.Random(1)
    for at in [0, size - 1, (4 << 20) - 1, 4 << 20, *dice.sample(range(size), scale.runs(sample=6, full=2000))]:
        flip_byte(file, at)
        (problem,) = only(sc.verify(tmp_path)).problems
        assert problem.file == "model.pt", at
        flip_byte(file, at)
    assert only(sc.verify(tmp_path)).verdict == "PARTIAL"
    assert any(seen) == cached


def test_what_cannot_be_brought_is_read_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(2).randbytes(3 << 20)
    (tmp_path / "a").write_bytes(content)
    tried: list[int] = []

    def bring(self: MappedFile, start: int, nbytes: int) -> None:
        tried.append(start)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(MappedFile, "bring", bring)
    whole, longer = sums(LocalStorage(tmp_path), [Stretch("a", 0, 3 << 20), Stretch("a", 5, 3 << 20)])
    assert whole == zlib.crc32(content)
    assert isinstance(longer, EOFError)
    assert tried == [0]


def test_memory_is_bounded_by_pieces_and_not_by_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """No read is longer than a piece, and no more windows are made than there are threads."""
    monkeypatch.setattr(summing, "_LOCAL", summing._Pace(2, 1000))
    storage, largest, windows = MemoryStorage(), 0, set[int]()
    storage.put("a", [bytes(100_000)])
    inner = storage.read_into

    def read_into(reads):
        nonlocal largest
        largest = max(largest, sum(len(read.into) for read in reads))
        windows.update(id(read.into.obj) for read in reads)
        inner(reads)

    monkeypatch.setattr(storage, "read_into", read_into)
    sums(storage, [Stretch("a", 0, 100_000)])
    assert (largest, len(windows) <= 2) == (1000, True)


def test_progress_is_told(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    told: list[tuple[int, int, int]] = []
    report = sc.verify(tmp_path, told=lambda *what: told.append(what))
    for step in report.steps:
        mine = [what for what in told if what[0] == step.step]
        assert sum(nbytes for _, nbytes, _ in mine) == step.nbytes
        assert {total for _, _, total in mine} == {step.nbytes}
    told.clear()
    sc.verify(tmp_path, quick=True, told=lambda *what: told.append(what))
    assert told == []
