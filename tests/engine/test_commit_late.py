"""An attempt that comes late to its commit: only the record that it knows may be replaced."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from shardckpt.engine.committing.commit import abandon_attempt, attempt_prefix, begin_attempt, commit_attempt
from shardckpt.errors import CommitUnknownError
from shardckpt.format.layout import MANIFEST, new_attempt
from shardckpt.format.manifest import decode_manifest
from shardckpt.run.catalog import Catalog
from shardckpt.storage import LocalStorage, MemoryObjects, open_storage
from shardckpt.storage.base import Storage
from shardckpt.storage.wrapping import Operation, StorageWrapper
from shardckpt.testing.faults import FailingStorage, on
from tests.run.making import commit, fill, is_whole, record_of

T = TypeVar("T")


@pytest.fixture(params=["conditional", "unconditional", "file system", "file system that exchanges nothing"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    if "file system" in request.param:
        if "nothing" in request.param:
            monkeypatch.setattr(LocalStorage, "exchange_folders", lambda *_: False)
        yield LocalStorage(tmp_path)
        return
    if request.param == "conditional":
        yield MemoryObjects()
        return
    plain = open_storage(f"memory://{uuid.uuid4().hex}")
    yield plain
    plain.delete_tree("step_5")


def begin(storage: Storage) -> tuple[str, str, bytes | None]:
    attempt = new_attempt()
    prefix = attempt_prefix(storage, 5, attempt)
    known = begin_attempt(storage, prefix)
    fill(storage, prefix)
    return attempt, prefix, known


@pytest.mark.parametrize("replaces", [False, True])
def test_a_newer_record_stays_in_force(storage: Storage, replaces: bool) -> None:
    if replaces:
        commit(storage, 5)
    (late, prefix, known), (newer, *of_newer) = begin(storage), begin(storage)
    commit_attempt(storage, of_newer[0], record_of(5, newer), known=of_newer[1])
    with pytest.raises(FileExistsError):
        commit_attempt(storage, prefix, record_of(5, late), known=known)
    assert Catalog(storage).record(5)[1].attempt == newer
    assert is_whole(storage, 5)


class Between(StorageWrapper):
    """Somebody else acts after the step was looked at, and before it is exchanged."""

    def __init__(self, inner: Storage, act: Callable[[], None]) -> None:
        super().__init__(inner)
        self._acts = [act]

    def around(self, operation: Operation, call: Callable[[], T]) -> T:
        if operation.name == "exchange_folders" and self._acts:
            self._acts.pop()()
        return call()


@pytest.mark.parametrize("storage", ["file system", "file system that exchanges nothing"], indirect=True)
def test_a_record_that_comes_after_the_last_look_stays_in_force(storage: Storage) -> None:
    commit(storage, 5)
    (late, prefix, known), (newer, *of_newer) = begin(storage), begin(storage)
    between = Between(storage, lambda: commit_attempt(storage, of_newer[0], record_of(5, newer), known=of_newer[1]))
    with pytest.raises(FileExistsError, match="saved by somebody else"):
        commit_attempt(between, prefix, record_of(5, late), known=known)
    assert Catalog(storage).record(5)[1].attempt == newer
    assert is_whole(storage, 5)
    abandon_attempt(storage, prefix)
    assert storage.list() == ["step_5/"]


@pytest.mark.parametrize("storage", ["file system"], indirect=True)
@pytest.mark.parametrize("done", [False, True])
def test_a_newer_save_that_cannot_be_given_back_is_told_and_kept(storage: Storage, done: bool) -> None:
    commit(storage, 5)
    (late, prefix, known), (newer, *of_newer) = begin(storage), begin(storage)
    failing = FailingStorage(storage, on("exchange_folders"), nth=2, after=done)
    between = Between(failing, lambda: commit_attempt(storage, of_newer[0], record_of(5, newer), known=of_newer[1]))
    with pytest.raises(FileExistsError if done else CommitUnknownError, match="saved by somebody else"):
        commit_attempt(between, prefix, record_of(5, late), known=known)
    kept = storage.read(f"{'step_5' if done else prefix}/{MANIFEST}")
    assert decode_manifest(kept).attempt == newer


@pytest.mark.parametrize("storage", ["file system", "file system that exchanges nothing"], indirect=True)
def test_an_error_of_the_look_at_what_was_replaced_undoes_nothing(storage: Storage) -> None:
    commit(storage, 5)
    attempt, prefix, known = begin(storage)
    failing = FailingStorage(storage, lambda op: op.name == "read" and not op.keys[0].startswith("step_5/"))
    commit_attempt(failing, prefix, record_of(5, attempt), known=known)
    assert failing.failed
    assert Catalog(storage).record(5)[1].attempt == attempt
    assert is_whole(storage, 5)
    assert storage.list() == ["step_5/"]


def test_a_step_that_was_deleted_meanwhile_is_saved_anew(storage: Storage) -> None:
    commit(storage, 5)
    attempt, prefix, known = begin(storage)
    storage.delete(["step_5/manifest.json"])
    commit_attempt(storage, prefix, record_of(5, attempt), known=known)
    assert Catalog(storage).record(5)[1].attempt == attempt
    assert is_whole(storage, 5)
