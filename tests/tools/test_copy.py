"""`copy_steps`: between all kinds of places; whole or absent, resumed, verified on the way, nothing replaced."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardckpt.errors import CheckpointNotFoundError, CheckpointSaveError, InvalidOperationError
from shardckpt.format.manifest import FileEntry
from shardckpt.run.catalog import Catalog
from shardckpt.run.scores import read_scores, write_score
from shardckpt.storage.base import Storage
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.faults import FailingStorage, RecordingStorage, flip_byte, on
from shardckpt.tools.copying import files as copying
from shardckpt.tools.copying.alone import alone
from shardckpt.tools.copying.files import Way, copy_files
from shardckpt.tools.copying.steps import CopyReport, copy_steps
from shardckpt.tools.verify import verify
from tests.run.making import FILES, commit, is_whole, walk
from tests.storage.conftest import place, s3, seaweedfs
from tests.tools.making import assert_loads, save

__all__ = ["place", "s3", "seaweedfs"]  # fixtures

KINDS = ("local", "folders", "objects")
NBYTES = sum(map(len, FILES.values()))


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str, str], Storage]:
    def make(kind: str, name: str) -> Storage:
        if kind == "local":
            return LocalStorage(tmp_path / name)
        return MemoryStorage(name) if kind == "folders" else MemoryObjects(name)

    return make


def outcomes(report: CopyReport) -> list[tuple[int, str]]:
    return [(step.step, step.outcome) for step in report.steps]


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_from_any_kind_of_place_to_any(make: Any, source: str, to: str) -> None:
    here, there = make(source, "here"), make(to, "there")
    for step in (1, 5):
        commit(here, step)
    write_score(here, Catalog(here).entry(5), score=0.5)
    report = copy_steps(here, there)
    assert (report.source, report.target, report.ok) == (here.url, there.url, True)
    (done,) = report.steps
    assert (done.step, done.outcome, done.nbytes, done.copied_nbytes) == (5, "copied", NBYTES, NBYTES)
    assert (done.files, done.found_nbytes, done.score) == (len(FILES), 0, 0.5)
    assert Catalog(there).steps() == [5]
    assert is_whole(there, 5)
    assert read_scores(there, Catalog(there).entries()).by_step == {5: 0.5}
    # Nothing but the step: the record, the score, the files; the other one when it is wanted, too.
    assert len([*walk(there)]) == len(FILES) + 2
    assert outcomes(copy_steps(here, there, every=True)) == [(1, "copied"), (5, "already there")]
    assert Catalog(there).steps() == [1, 5]
    back = make(source, "back")
    copy_steps(there, back, step=1)
    (one,), (other,) = ([Catalog(s).record(1)[1]] for s in (here, back))
    plain = [[(f.name.rpartition("/")[2], f.nbytes, f.crc) for f in record.files] for record in (one, other)]
    assert (plain[0], one.tables, one.created) == (plain[1], other.tables, other.created)


@pytest.mark.parametrize("to", KINDS)
def test_what_is_there_is_never_touched(make: Any, to: str) -> None:
    here, there = make("folders", "here"), make(to, "there")
    commit(here, 1)
    commit(there, 1, created="2026-02-02T00:00:00Z")
    before = {key: there.read(key) for key in walk(there)}
    report = copy_steps(here, there)
    assert (outcomes(report), report.ok) == ([(1, "another is there")], False)
    assert "2026-02-02" in report.steps[0].what
    assert {key: there.read(key) for key in walk(there)} == before
    key = "step_1/manifest.json"
    there.replace(key, before[key][:-9])
    report = copy_steps(here, there)
    assert (outcomes(report), "was not touched" in report.steps[0].what) == ([(1, "another is there")], True)
    assert there.read(key) == before[key][:-9]


@pytest.mark.parametrize("to", ["folders", "objects"])
def test_what_fails_anywhere_leaves_no_step_and_is_gone_on_with(make: Any, to: str) -> None:
    here = make("objects", "here")
    commit(here, 1)
    reference = RecordingStorage(make(to, "reference"))
    copy_steps(here, reference)
    changes = ("put", "make_folder", "rename_folder", "sync_folder", "delete")
    count = sum(operation.name in changes for operation in reference.operations)
    assert count > len(FILES)
    found = []
    for nth in range(1, count + 1):
        inner = make(to, f"there {nth}")
        with pytest.raises(CheckpointSaveError, match="the same command goes on"):
            copy_steps(here, FailingStorage(inner, on(*changes), nth=nth))
        committed = Catalog(inner).steps()
        assert all(is_whole(inner, step) for step in committed)
        (done,) = copy_steps(here, inner).steps
        assert done.outcome == ("already there" if committed else "copied")
        assert is_whole(inner, 1)
        assert len([*walk(inner)]) == len(FILES) + 1
        found.append(done.found_nbytes)
    assert NBYTES in found  # only the record was missing: not a byte was copied again
    assert min(found) == 0


def test_files_that_a_killed_copy_has_cut_off_or_torn_are_copied_again(tmp_path: Path) -> None:
    here, there = LocalStorage(tmp_path / "here"), LocalStorage(tmp_path / "there")
    commit(here, 1)
    with pytest.raises(CheckpointSaveError, match="the same command goes on"):
        copy_steps(here, FailingStorage(there, on("rename_folder")))
    (folder,) = (tmp_path / "there").iterdir()
    flip_byte(folder / "model.pt", 0)
    (folder / "rank_0.pt").write_bytes(b"cut")
    (folder / "stray").write_bytes(b"")
    (done,) = copy_steps(here, there).steps
    again = len(FILES["model.pt"]) + len(FILES["rank_0.pt"])
    assert (done.outcome, done.copied_nbytes, done.found_nbytes) == ("copied", again, NBYTES - again)
    assert is_whole(there, 1)
    assert [*walk(there)] == [*walk(here)]


@pytest.mark.parametrize("to", KINDS)
def test_a_damaged_step_is_not_offered_elsewhere_and_the_others_are_copied(make: Any, tmp_path: Path, to: str) -> None:
    here, there = make("local", "here"), make(to, "there")
    for step in (1, 2, 3):
        commit(here, step)
    flip_byte(tmp_path / "here/step_1/rank_1.pt", -1)
    (tmp_path / "here/step_2/model.pt").unlink()
    report = copy_steps(here, there, every=True)
    assert (outcomes(report), report.ok) == ([(1, "damaged"), (2, "damaged"), (3, "copied")], False)
    assert "rank_1.pt" in report.steps[0].what
    assert Catalog(there).steps() == [3]
    assert not [key for key in walk(there) if key.endswith("rank_1.pt") and "step_1" in key]


def test_one_copies_to_a_folder_at_a_time(tmp_path: Path) -> None:
    here, there = LocalStorage(tmp_path / "here"), LocalStorage(tmp_path / "there")
    commit(here, 1)
    with pytest.raises(CheckpointSaveError, match="the same command goes on"):
        copy_steps(here, FailingStorage(there, on("rename_folder")))
    (folder,) = (path.name for path in (tmp_path / "there").iterdir())
    before = [*walk(there)]
    with alone(there, folder), pytest.raises(CheckpointSaveError, match="another process is copying"):
        copy_steps(here, there)
    assert [key for key in walk(there) if not key.endswith("/copying")] == before
    assert outcomes(copy_steps(here, there)) == [(1, "copied")]
    assert [*walk(there)] == [*walk(here)]


def test_large_files_go_through_small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_WINDOW", 1000)
    here, there = MemoryObjects("here"), MemoryStorage("there")
    content = bytes(range(256)) * 45  # not a multiple of the window
    here.put("a/large", [content])
    entry = FileEntry("large", len(content), zlib.crc32(content), "cc", 0)
    told: list[int] = []
    reading = RecordingStorage(here)
    copy_files(Way(reading, "a", there, "b", told.append), [(entry, entry)])
    assert there.read("b/large") == content
    assert sum(told) == len(content)
    assert len(reading.operations) == len(told) == 12
    failing = FailingStorage(here, on("read_into"), nth=7, error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        copy_files(Way(failing, "a", there, "c", told.append), [(entry, entry)])
    assert there.list("c") == []


def test_which_steps_are_meant(tmp_path: Path) -> None:
    run, to = tmp_path / "run", tmp_path / "to"
    save(run, 3, 10)
    assert outcomes(copy_steps(run / "step_3", to)) == [(3, "copied")]
    assert outcomes(copy_steps(run, to)) == [(10, "copied")]
    for wrong in (4, 10**30):
        with pytest.raises(CheckpointNotFoundError):
            copy_steps(run, to, step=wrong)
    with pytest.raises(CheckpointNotFoundError):
        copy_steps(run / "step_3", to, step=10)
    with pytest.raises(CheckpointNotFoundError, match="no committed step"):
        copy_steps(LocalStorage(tmp_path / "nothing"), to)
    with pytest.raises(InvalidOperationError, match="called like a step"):
        copy_steps(run, tmp_path / "step_4")
    with pytest.raises(InvalidOperationError, match="either"):
        copy_steps(run, to, step=3, every=True)


@pytest.mark.s3
def test_to_a_real_object_store_and_back(seaweedfs: Any, place: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.secret_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", seaweedfs.endpoint)
    url = place(seaweedfs)
    save(tmp_path / "run", 1, 7)
    assert outcomes(copy_steps(tmp_path / "run", url, every=True)) == [(1, "copied"), (7, "copied")]
    assert [step.verdict for step in verify(url).steps] == ["COMPLETE"] * 2
    assert_loads(url, 7)
    assert outcomes(copy_steps(url, tmp_path / "back")) == [(7, "copied")]
    assert outcomes(copy_steps(url, tmp_path / "run", every=True)) == [(1, "already there"), (7, "already there")]
    assert_loads(tmp_path / "back", 7)
