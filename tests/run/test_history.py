"""What a run remembers of its steps while its job lives, as far as it decides what is kept."""

from __future__ import annotations

from datetime import timedelta

import pytest

from shardckpt.engine.pending import PendingSave
from shardckpt.run.catalog import Catalog
from shardckpt.run.history import History
from shardckpt.run.retention import KeepBest, KeepLast
from shardckpt.storage.base import Storage
from tests.run.making import commit

HOUR = timedelta(hours=1)


@pytest.mark.parametrize("preserve_model", [False, True])
def test_a_call_goes_by_its_own_policy_and_never_touches_what_is_protected(
    storage: Storage, preserve_model: bool
) -> None:
    for step in range(1, 6):
        commit(storage, step)
    catalog = Catalog(storage)
    history = History(catalog, KeepLast(4), grace=HOUR)
    history.protect(2, "the step that was resumed from")
    history.write_score(3, -0.5)
    gone = history.retain(KeepBest(1), preserve_model=preserve_model)
    assert [(one.step, one.model_kept) for one in gone] == [(1, preserve_model), (4, preserve_model)]
    assert catalog.steps() == ([1, 2, 3, 4, 5] if preserve_model else [2, 3, 5])
    assert list(catalog.full_steps()) == [5, 3, 2]


def test_after_a_commit_the_policy_of_the_run_holds_and_the_step_just_saved_stays(storage: Storage) -> None:
    for step in (3, 4, 5, 1):
        commit(storage, step)
    history = History(Catalog(storage), KeepLast(1), grace=HOUR)
    assert history.note(1, 0.5, save=PendingSave(1))
    assert history.committed(1) == [3, 4]
    assert Catalog(storage).steps() == [1, 5]
