"""Blobs go when nothing refers to them any more, and never when something may."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.format.layout import BLOBS, MANIFEST, aside_folder
from shardckpt.run.catalog import Catalog
from shardckpt.run.leftovers import DeadAttempts
from shardckpt.run.shared.references import UnknownReferencesError, references
from shardckpt.run.shared.sweeping import sweep_blobs
from shardckpt.storage import LocalStorage, MemoryObjects
from shardckpt.storage.base import Buffer, RenamingStorage, Storage
from shardckpt.tools.contents import files_below
from shardckpt.tools.repair import repair
from shardckpt.tools.verify import verify

Place = Callable[[], Storage]


@pytest.fixture(params=["files", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path) if request.param == "files" else MemoryObjects()


def state(version: float = 0.0) -> dict[str, Any]:
    return {"model": {"base": torch.full((500,), version)}, "step": torch.zeros(1)}


def save(storage: Storage, *steps: tuple[int, float], keep: int = 100) -> None:
    with sc.CheckpointManager(storage, keep=sc.KeepLast(keep)) as checkpoints:
        for step, version in steps:
            checkpoints.save(step, state(version), frozen=("model.base",)).result()


def blobs(storage: Storage) -> list[str]:
    return [f"{BLOBS}/{name}" for name in files_below(storage, BLOBS) if name.endswith(".pt")]


def marks(storage: Storage) -> list[str]:
    return [name for name in files_below(storage, BLOBS) if not name.endswith(".pt")]


def named(storage: Storage, step: int) -> str:
    return Catalog(storage).record(step)[1].files[0].blob


def is_whole(storage: Storage) -> bool:
    return all(report.verdict != "DAMAGED" for report in verify(storage).steps)


def test_a_blob_stays_as_long_as_a_step_refers_to_it(storage: Storage) -> None:
    save(storage, (1, 1.0), (2, 1.0), (3, 2.0))
    old, new = named(storage, 1), named(storage, 3)
    assert sweep_blobs(storage) == []
    save(storage, (4, 2.0), keep=3)  # step 1 goes, and step 2 still has its base
    assert set(blobs(storage)) == {old, new}
    save(storage, (5, 2.0), keep=3)
    assert blobs(storage) == [new]
    assert marks(storage) == []
    assert is_whole(storage)


def test_deletion_by_name_lets_go_too(storage: Storage) -> None:
    save(storage, (1, 1.0), (2, 2.0))
    kept = named(storage, 2)
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.delete_checkpoint(1)
    assert blobs(storage) == [kept]


def test_only_the_model_is_kept_with_its_base(storage: Storage) -> None:
    save(storage, (1, 1.0), (2, 2.0))
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.delete_checkpoint(1, preserve_model=True)
        loaded: dict[str, Any] = {"model": {"base": torch.zeros(500)}}
        checkpoints.load(1, loaded)
    assert torch.equal(loaded["model"]["base"], torch.ones(500))
    assert len(blobs(storage)) == 2


def test_what_a_dead_save_left_goes_and_what_is_not_ours_stays(storage: Storage) -> None:
    save(storage, (1, 1.0))
    digest = "0" * 64
    for key in (f"{BLOBS}/{digest}/abcdefgh/frozen.pt", f"{BLOBS}/{digest}/abcdefgi.tmp/frozen.pt"):
        storage.put(key, [b"cut off"])
    storage.put(f"{BLOBS}/notes/mine.txt", [b"mine"])
    storage.put("elsewhere/rank_0.pt", [b"not ours"])
    assert sorted(sweep_blobs(storage)) == [f"{BLOBS}/{digest}/abcdefgh", f"{BLOBS}/{digest}/abcdefgi.tmp"]
    assert blobs(storage) == [named(storage, 1)]
    assert storage.read(f"{BLOBS}/notes/mine.txt") == b"mine"


def in_doubt(storage: Storage) -> Iterable[Callable[[], Callable[[], None]]]:
    """What makes it impossible to tell; each gives what undoes it."""
    record = f"step_2/{MANIFEST}"
    good = storage.read(record)

    def damage() -> Callable[[], None]:
        storage.replace(record, good.replace(b"blobs", b"blobz"))
        return lambda: storage.replace(record, good)

    def lose() -> Callable[[], None]:
        storage.delete([record])
        return lambda: storage.replace(record, good)

    def attempt() -> Callable[[], None]:
        folder = aside_folder(7, "0123456789", "tmp") if isinstance(storage, RenamingStorage) else "step_7/0123456789"
        storage.put(f"{folder}/rank_0.pt", [b"half"])
        return lambda: storage.delete_tree(folder)

    yield from (damage, lose, attempt)
    if isinstance(storage, RenamingStorage):

        def set_aside() -> Callable[[], None]:
            storage.rename_folder("step_2", "damaged_step_2.0123456789")
            storage.delete([f"damaged_step_2.0123456789/{MANIFEST}"])

            def undo() -> None:
                storage.replace(f"damaged_step_2.0123456789/{MANIFEST}", good)
                storage.rename_folder("damaged_step_2.0123456789", "step_2")

            return undo

        yield set_aside


def test_in_doubt_nothing_is_deleted(storage: Storage) -> None:
    save(storage, (1, 1.0), (2, 2.0), (3, 3.0))
    with sc.CheckpointManager(storage) as checkpoints:
        for make in list(in_doubt(storage)):
            undo = make()
            checkpoints.delete_checkpoint(1, missing_ok=True)
            with pytest.raises(UnknownReferencesError):
                references(storage)
            assert sweep_blobs(storage) == []
            assert len(blobs(storage)) == 3
            assert marks(storage) == []
            undo()
    assert len(sweep_blobs(storage)) == 1
    assert is_whole(storage)


@pytest.mark.parametrize("name", ["step_1.0123456789.old", "copy of step 1"])
def test_older_versions_and_copies_count(tmp_path: Path, name: str) -> None:
    storage = LocalStorage(tmp_path)
    save(storage, (1, 1.0), (2, 2.0))
    storage.rename_folder("step_1", name)
    assert sweep_blobs(storage) == []
    storage.delete_tree(name)
    assert len(sweep_blobs(storage)) == 1


class Meeting(LocalStorage):
    """Lets something happen before or after a file whose name has this end is put."""

    def __init__(self, root: Path, *, end: str, before: bool, then: Callable[[], None]) -> None:
        super().__init__(root)
        self._end, self._before, self._then = end, before, then

    def put(self, key: str, parts: Iterable[Buffer]) -> int:
        here = key.endswith(self._end)
        if here and self._before:
            self._then()
        nbytes = super().put(key, parts)
        if here and not self._before:
            self._then()
        return nbytes


@pytest.mark.parametrize("before", [True, False])
def test_a_save_that_comes_while_a_blob_is_about_to_go(tmp_path: Path, *, before: bool) -> None:
    """Before the mark it is seen, and the blob stays; after it the save puts a blob of its own."""
    plain = LocalStorage(tmp_path)
    save(plain, (1, 1.0), (2, 2.0))
    with sc.CheckpointManager(plain) as checkpoints:
        lone = named(plain, 1)
        plain.delete_tree("step_1")
        meeting = Meeting(tmp_path, end=".doomed", before=before, then=lambda: save(plain, (3, 1.0)))
        swept = sweep_blobs(meeting)
        assert checkpoints.steps() == [2, 3]
    assert swept == ([] if before else [lone.rpartition("/")[0]])
    assert (named(plain, 3) == lone) is before
    assert len(blobs(plain)) == 2
    assert marks(plain) == []
    assert is_whole(plain)


def test_a_blob_is_not_deleted_under_a_save_that_has_chosen_it(tmp_path: Path) -> None:
    """Whoever deletes comes when the save has looked, and before its record is there."""
    plain = LocalStorage(tmp_path)
    save(plain, (1, 1.0), (2, 2.0))
    plain.delete_tree("step_1")
    swept: list[list[str]] = []
    meeting = Meeting(tmp_path, end=MANIFEST, before=True, then=lambda: swept.append(sweep_blobs(plain)))
    save(meeting, (3, 1.0))
    assert swept == [[]]
    assert len(blobs(plain)) == 2
    assert is_whole(plain)


def test_on_an_object_store_the_attempt_is_seen_before_it_has_a_file() -> None:
    looked: list[str] = []

    class Looking(MemoryObjects):
        def list(self, prefix: str = "") -> list[str]:
            if prefix.startswith(BLOBS) and prefix != BLOBS:
                with pytest.raises(UnknownReferencesError, match="may be a save under way"):
                    references(self)
                looked.append(prefix)
            return super().list(prefix)

    save(Looking(), (1, 1.0))
    assert looked


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_a_lost_record_comes_back_with_the_files_that_steps_share(storage: Storage, how: str) -> None:
    save(storage, (1, 1.0), (2, 1.0))
    written = Catalog(storage).record(2)[1]
    storage.delete([f"step_2/{MANIFEST}"])
    if how == "damaged":
        storage.put(f"step_2/{MANIFEST}", [b'{"format": 2, "st'])
    assert "are shared with other steps" in repair(storage, step=2).what
    report = repair(storage, step=2, apply=True)
    assert report.after is not None
    assert (report.applied, report.after.verdict) == (True, "PARTIAL")
    made = Catalog(storage).record(2)[1]
    assert (made.files, made.tables, made.layouts) == (written.files, written.tables, written.layouts)
    with sc.CheckpointManager(storage) as checkpoints:
        loaded = state()
        checkpoints.load(2, loaded)
    assert torch.equal(loaded["model"]["base"], torch.ones(500))
    assert sweep_blobs(storage) == []


def test_where_bases_differ_only_what_says_itself_which_it_has_is_repaired(storage: Storage) -> None:
    """On an object store every step does; on a file system nothing is made up."""
    save(storage, (1, 1.0), (2, 2.0))
    written = Catalog(storage).record(2)[1]
    storage.delete([f"step_2/{MANIFEST}"])
    if isinstance(storage, RenamingStorage):
        with pytest.raises(sc.CheckpointDamagedError, match=r"2 versions of frozen\.pt"):
            repair(storage, step=2, apply=True)
        return
    assert repair(storage, step=2, apply=True).applied
    assert Catalog(storage).record(2)[1].files == written.files


@pytest.mark.parametrize("hurt", ["gone", "damaged", "about to go"])
def test_a_lost_record_stays_lost_without_its_base(tmp_path: Path, hurt: str) -> None:
    storage = LocalStorage(tmp_path)
    save(storage, (1, 1.0), (2, 1.0))
    base = named(storage, 2)
    storage.delete([f"step_2/{MANIFEST}"])
    if hurt == "about to go":
        storage.put(f"{base.rpartition('/')[0]}.0123456789.doomed", [b""])
    else:
        good = storage.read(base)
        storage.delete([base])
        if hurt == "damaged":
            storage.put(base, [good[:-200], b"x", good[-199:]])
    for ranks in (None, 1):
        with pytest.raises(sc.CheckpointDamagedError, match="files that steps share"):
            repair(storage, step=2, apply=True, ranks=ranks)


def test_blobs_of_a_dead_save_go_with_it(tmp_path: Path) -> None:
    """Not only when a policy deletes a step."""
    storage, now = LocalStorage(tmp_path), [0.0]
    save(storage, (1, 1.0), (2, 2.0))
    storage.rename_folder("step_2", aside_folder(2, "0123456789", "tmp"))
    storage.delete([f"{aside_folder(2, '0123456789', 'tmp')}/{MANIFEST}"])
    dead = DeadAttempts(Catalog(storage), grace=timedelta(hours=1), clock=lambda: now[0])
    assert dead.tidy() == []
    assert len(blobs(storage)) == 2
    now[0] = 3601.0
    assert len(dead.tidy()) == 1
    assert blobs(storage) == [named(storage, 1)]
