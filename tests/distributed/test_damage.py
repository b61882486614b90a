"""Damage is found on another mesh, too, where no rank reads a record whole; all ranks then go back to the same step."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardckpt as sc
from shardckpt.format.index import StoredRecord, decode_index
from shardckpt.format.manifest import decode_manifest
from shardckpt.testing.faults import flip_byte, truncate
from tests.distributed.jobs import Job, Layout, differences, keep_reference
from tests.distributed.tensors import Grid, Placed, Split, Tensor, checkpoints, load, save, view_of

BIG = Tensor("big", (64, 96))
ROWS, COLUMNS = Split((0,)), Split((1,))
QUARTERS, STRIDED = Split((0, 1)), Split((0, 0), from_the_right=True)
COPIES = Split((None, None))


def records(root: Path, step: int) -> list[tuple[Path, StoredRecord, list[str]]]:
    """Every tensor record of a step that has bytes: its file, where it lies, and what it is called there."""
    folder = root / f"step_{step}"
    found = []
    for entry in decode_manifest((folder / "manifest.json").read_bytes()).files:
        assert entry.index is not None
        at, nbytes, _ = entry.index
        content = (folder / entry.name).read_bytes()
        index = decode_index(content[at : at + nbytes], entry.nbytes)
        for number, record in enumerate(index.records):
            if record.nbytes:
                names = [box.name for box in index.boxes if box.record == number]
                found.append((folder / entry.name, record, names))
    return found


def save_one(rank: int, world_size: int, folder: Path, root: Path, grid: Grid, placed: list[Placed]) -> None:
    save(root, grid, placed)


def load_damaged(
    rank: int,
    world_size: int,
    folder: Path,
    root: Path,
    grid: Grid,
    placed: list[Placed],
    flips: list[tuple[Path, int]],
    in_place: bool,
) -> tuple[list[int], list[str]]:
    """Load the only step once for each byte, flipped, and once whole: (which were found, what went wrong)."""
    mesh, found, wrong = grid.mesh(), [], []
    with checkpoints(root, mesh) as manager:
        for file, offset in flips:
            flip_together(file, offset)
            wholes = {item.tensor.name: item.tensor.blank() for item in placed}
            state = {"model": {p.tensor.name: view_of(wholes[p.tensor.name], p.split, mesh) for p in placed}}
            try:
                manager.load(1, state, policy=sc.LoadPolicy(in_place=in_place))
            except sc.CheckpointDamagedError as error:
                found.append(offset)
                wrong += [] if file.name in str(error) else [f"{file.name} byte {offset}: {error}"]
                changed = [name for name, whole in wholes.items() if whole.view(torch.uint8).any()]
                wrong += [f"{name} was changed" for name in changed if not (in_place and error.state_changed)]
            else:
                wrong += [f"byte {offset} of {file.name}: {name} was loaded" for name in load(manager, mesh, placed)]
            flip_together(file, offset)
        return found, wrong + load(manager, mesh, placed)


def flip_together(file: Path, offset: int) -> None:
    if dist.get_rank() == 0:
        flip_byte(file, offset)
    dist.barrier()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("saved_on", "saved", "loaded_on", "loaded"),
    [
        (Grid((1,)), None, Grid((4,)), ROWS),
        (Grid((1,)), None, Grid((4,)), COLUMNS),
        (Grid((2, 2)), COPIES, Grid((2, 2)), QUARTERS),
        (Grid((2,)), ROWS, Grid((4,)), COLUMNS),
        (Grid((2, 2)), STRIDED, Grid((3,)), COLUMNS),
        (Grid((2,)), COLUMNS, Grid((2, 2)), STRIDED),
        (Grid((1, 4)), COPIES, Grid((4, 1)), QUARTERS),
        (Grid((4, 1)), None, Grid((1, 4)), QUARTERS),
        (Grid((1, 4)), None, Grid((4, 1)), STRIDED),
    ],
    ids=lambda value: "x".join(map(str, value.shape)) if isinstance(value, Grid) else str(value),
)
def test_a_flipped_byte_in_a_record_that_no_rank_reads_whole(
    ranks, tmp_path, saved_on, saved, loaded_on, loaded, in_place
):
    small = Tensor("small", (5, 7), torch.bfloat16)
    ranks.run(saved_on.ranks, save_one, tmp_path, saved_on, [Placed(BIG, saved), Placed(small, saved)])
    flips, copies = flips_in(tmp_path, random.Random(0))
    after = [Placed(BIG, loaded), Placed(small, loaded)]
    outcomes = ranks.run(loaded_on.ranks, load_damaged, tmp_path, loaded_on, after, flips, in_place)
    for found, wrong in outcomes:
        assert not wrong
        assert found == outcomes[0][0]
        # A byte may be damaged without harm if nobody reads it: in a copy beside the one that is read.
        assert len(found) * copies == len(flips)


def flips_in(root: Path, rng: random.Random) -> tuple[list[tuple[Path, int]], int]:
    """Bytes of all records of step 1, and how many copies of every record there are."""
    every = records(root, 1)
    flips = [(file, record.at + place) for file, record, _ in every for place in (0, rng.randrange(record.nbytes))]
    copies = sum(1 for _, record, _ in every if (record.shape, record.crc) == (every[0][1].shape, every[0][1].crc))
    return flips, copies


def train_and_save_often(rank: int, world_size: int, folder: Path, root: Path) -> None:
    """Four steps, each saved; the state of the first lies beside the run."""
    job = Job(Layout(2, 2), seed=0)
    with checkpoints(root / "run", job.mesh) as manager:
        for step in range(1, 5):
            job.train_step()
            manager.save(step, job.state()).result()
            if step == 1:
                keep_reference(root / "reference.pt", job.gathered())


def resume(
    rank: int, world_size: int, folder: Path, root: Path, layouts: list[Layout]
) -> list[tuple[int, list[tuple[int, str]], list[str]]]:
    """(step, which were skipped and why, what differs from step 1) on each of these meshes."""
    found = []
    for layout in layouts:
        job = Job(layout, seed=1)
        with checkpoints(root / "run", job.mesh) as manager:
            info = manager.resume(job.state())
        assert info is not None
        reference = torch.load(root / "reference.pt", weights_only=True)
        found.append((info.step, list(info.skipped), list(differences(reference, job.gathered()))))
    return found


@pytest.mark.parametrize("world_size", [4, 2])
@pytest.mark.sampled(2)
def test_all_ranks_go_back_to_the_newest_step_that_is_good_on_all(ranks, tmp_path, world_size):
    """Of step 4 one tensor of rank 3's file is damaged, step 3 lacks a file, step 2 a byte at the end of one."""
    ranks.run(4, train_and_save_often, tmp_path)
    run = tmp_path / "run"
    file, record, names = next(
        found for found in records(run, 4) if found[0].name == "rank_3.pt" and "up.weight" in found[2][0]
    )
    flip_byte(file, record.at + record.nbytes // 3)
    (run / "step_3" / "rank_1.pt").unlink()
    truncate(run / "step_2" / "replicated.1.pt", (run / "step_2" / "replicated.1.pt").stat().st_size - 1)
    layouts = [layout for layout in (Layout(4), Layout(1, 4), Layout(2), Layout(1, 2)) if layout.ranks == world_size]
    outcomes = ranks.run(world_size, resume, tmp_path, layouts)
    assert all(outcome == outcomes[0] for outcome in outcomes)
    for step, skipped, different in outcomes[0]:
        assert step == 1
        assert not different
        assert [number for number, _ in skipped] == [4, 3, 2]
        for (_, reason), name in zip(skipped, ("rank_3.pt", "rank_1.pt", "replicated.1.pt"), strict=True):
            assert name in reason, f"{names}: {reason}"
