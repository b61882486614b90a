"""The same file, to the last byte, if all ranks put it: each a stretch; and one fails, all know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.engine.consolidated import stretches
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.testing.faults import FailingStorage, RecordingStorage, TornStorage, on
from shardckpt.testing.gangs import run_ranks
from tests.engine.consolidated.stages import FOLDER, RANKS, Stage, is_whole, load, make_place, on_all, write_on
from tests.engine.consolidated.test_write import attempt_twice, check_outcomes

MIB = 1 << 20
PLACES = ("memory", "objects", "local")


@pytest.fixture
def all_put(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches, "LEAST", MIB)


def recorded(place: Storage, ranks: int = RANKS, number: int | None = None) -> list[list[tuple[str, str]]]:
    """Write it; what each rank put."""
    views = [RecordingStorage(place) for _ in range(ranks)]
    models = [Stage(rank if number is None else number) for rank in range(ranks)]
    run_ranks(ranks, lambda gangs: write_on(gangs, views[gangs.root.rank], models[gangs.root.rank]))
    puts = ("put", "put_range", "put_parts")
    return [[(op.name, op.key.rpartition("/")[2]) for op in view.operations if op.name in puts] for view in views]


@pytest.mark.parametrize("kind", PLACES)
def test_it_is_to_the_last_byte_what_rank_0_puts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    alone, place = MemoryStorage(), make_place(kind, tmp_path)
    assert recorded(alone)[1] == [("put", "model.pt.part_1")]
    monkeypatch.setattr(stretches, "LEAST", MIB)
    verb = "put_parts" if kind == "objects" else "put_range"
    assert recorded(place) == [[("put", f"model.pt.part_{rank}"), (verb, "model.pt")] for rank in range(RANKS)]
    assert is_whole(place)
    assert place.read(f"{FOLDER}/model.pt") == alone.read(f"{FOLDER}/model.pt")


@pytest.mark.usefixtures("all_put")
def test_what_all_hold_is_in_no_part() -> None:
    """Data-parallel copies: each rank puts its stretch of its own memory."""
    place = MemoryStorage()
    assert recorded(place, ranks=2, number=1) == [[("put_range", "model.pt")]] * 2
    found = load(place)
    assert all(torch.equal(found[name], value) for name, value in Stage(1).state_dict().items())


@pytest.mark.usefixtures("all_put")
@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(
    ("rank", "verb", "key", "after"),
    [
        (0, "put", "part_0", False),
        (1, "put", "model.pt", False),
        (0, "put", "model.pt", True),
        (2, "read_into", "part_0", False),
        (0, "read_into", "part_1", False),
        (0, "delete", "part_1", False),
        (0, "begin_upload", "model.pt", False),
        (0, "finish_upload", "model.pt", False),
        (0, "finish_upload", "model.pt", True),
    ],
)
def test_one_operation_fails(tmp_path: Path, kind: str, rank: int, verb: str, key: str, after: bool) -> None:
    place = make_place(kind, tmp_path)
    if verb.endswith("upload") and kind != "objects":
        return
    if (verb, key) == ("put", "model.pt"):
        verb = "put_parts" if kind == "objects" else "put_range"
    views: list[Any] = [place] * RANKS
    views[rank] = FailingStorage(place, on(verb, key=key), after=after)
    outcomes = on_all(lambda gangs: attempt_twice(gangs, views, place))
    check_outcomes(outcomes, rf"rank {rank}: ConnectionResetError: injected")
    assert is_whole(place)
    assert not isinstance(place, MemoryObjects) or not place.list_uploads()


@pytest.mark.usefixtures("all_put")
@pytest.mark.parametrize("where", [0, 1_000_003, 2_000_001])
def test_a_flipped_byte_in_a_part_is_found(where: int) -> None:
    """In tensors that lie in one rank's stretch, and in such as lie in those of two."""
    place = MemoryStorage()
    torn = TornStorage(place)
    torn.tear(f"{FOLDER}/model.pt.part_1", flip=where)
    torn.tear(f"{FOLDER}/model.pt.part_2", flip=where)
    views: list[Any] = [torn] * RANKS
    outcomes = on_all(lambda gangs: attempt_twice(gangs, views, place))
    check_outcomes(outcomes, "CheckpointDamagedError: model.layers.[12].(weight|count) is not what its ranks held")


@pytest.mark.usefixtures("all_put")
def test_a_rank_with_a_disk_of_its_own_is_found_out() -> None:
    """Though what it would have put there is missed by nobody: copies are in no part, and the file has its length."""
    views: list[Storage] = [MemoryStorage(), MemoryStorage()]

    def act(gangs: sc.Gangs) -> str:
        with pytest.raises(sc.GangError) as caught:
            write_on(gangs, views[gangs.root.rank], Stage(1))
        return str(caught.value)

    for error in run_ranks(2, act):
        assert "rank 1: RootNotSharedError" in error
    assert views[0].list(FOLDER) == []


@pytest.mark.usefixtures("all_put")
def test_a_step_of_a_manager_has_it(tmp_path: Path) -> None:
    """Committed with its digest; no part is left."""

    def act(gangs: sc.Gangs) -> None:
        with sc.CheckpointManager(tmp_path, gangs) as manager:
            manager.begin_checkpoint(1)
            manager.save_state({"n": 1})
            manager.save_consolidated_fsdp_model(Stage(gangs.root.rank))
            manager.commit_checkpoint()

    run_ranks(RANKS, act)
    names = sorted(path.name for path in (tmp_path / "step_1").iterdir())
    assert [name for name in names if name.startswith("model")] == ["model.pt"]
    found = torch.load(tmp_path / "step_1/model.pt", weights_only=True)["model"]
    assert torch.equal(found["layers.2.weight"], Stage(2).layers["2"].weight)
    found_whole = sc.verify(tmp_path)
    assert found_whole.ok
    assert found_whole.steps[0].checked_nbytes > 8_000_000
