"""A sample of the soak, on ranks of the pool; and that what goes wrong in it is found.

`--scale 30`: a minute; `--scale full`: twenty. With torchrun: `python -m tests.kills.soak`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import shardckpt as sc
from shardckpt.testing.pool import ProcessPool
from tests.kills.elastic import Line, SharedRng, make_model
from tests.kills.enduring import one_step
from tests.kills.soak import KINDS, soak
from tests.kills.truth import Judge, Notes, Truth, Watcher
from tests.scorecard import Scale, Scorecard
from tests.storage.s3server import need_seaweedfs


@pytest.mark.crash
@pytest.mark.s3
@pytest.mark.timeout(3600)
@pytest.mark.larger
def test_nothing_is_wrong_whatever_is_killed(
    ranks: ProcessPool, tmp_path: Path, scale: Scale, scorecard: Scorecard
) -> None:
    need_seaweedfs()
    seconds = scale.runs(sample=2, full=1200)
    report = soak(tmp_path, seconds=seconds, seed=seconds, pause_s=(0.2, 1.0), pool=ranks)
    scorecard.add(
        "soak: a rank, a node, the storage server", runs=report.kills.total(), torn=len(report.wrong),
        notes=f"{report.words['resumed']} lives resumed, {report.words['loss']} losses as undisturbed",
    )  # fmt: skip
    assert not report.wrong, str(report)
    assert set(report.kills) == set(KINDS)
    assert report.words["ended"] == 2
    assert report.watcher.loads > 0


def line(word: str, step: int, value: str = "", pid: int = 1) -> Line:
    return Line(word, rank=0, pid=pid, step=step, life=0, at_s=0.0, value=value)


def test_the_judge_finds_what_is_wrong() -> None:
    judge = Judge(Truth())
    for step in (1, 2, 3):
        judge.hear(line("loss", step, judge.truth.loss(step).hex()))
        judge.hear(line("told", step))
    for pid in (2, 3):
        judge.hear(line("load", 0, pid=pid))
    judge.hear(line("resumed", 3, pid=2))
    judge.hear(line("loss", 2, judge.truth.loss(2).hex()))
    judge.hear(line("ended", 3, judge.truth.total(3).hex()))
    assert judge.wrong == []
    judge.hear(line("resumed", 2, pid=3))
    judge.hear(line("loss", 4, (judge.truth.loss(4) * (1 + 1e-15)).hex()))
    judge.hear(line("ended", 4, judge.truth.total(3).hex()))
    promise, loss, total = judge.wrong
    assert promise == "step 3 was promised, and rank 0 goes on from 2"
    assert loss.startswith("loss of step 4 on rank 0: ")
    assert total.startswith("sum of step 4 on rank 0: ")


def test_notes_are_read_in_whole_lines(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    text = line("told", 7).text() + "\n"
    with (tmp_path / "notes").open("w") as file:
        found = []
        for piece in (text + text[:5], text[5:-1], "\n"):
            file.write(piece)
            file.flush()
            found.append([each.step for each in notes.new()])
    assert found == [[7], [], [7]]


def saved(root: Path, steps: int) -> None:
    model, optimizer = make_model(1)
    with sc.CheckpointManager(root, sc.Gangs.local()) as checkpoints:
        for step in range(1, steps + 1):
            one_step(model, optimizer, sc.Gangs.local(), ends=False)
            checkpoints.save(step, {"model": model, "optimizer": optimizer, "rng": SharedRng()})


def test_the_watcher_finds_what_is_wrong(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    judge = Judge(Truth())
    watcher = Watcher(str(tmp_path), {}, judge, every_s=1.0)
    judge.promised = 3
    assert (watcher.look(), judge.wrong) == (3, [])
    (tmp_path / "step_3").rename(tmp_path / "step_4")  # a record of another step
    judge.promised = 4
    with pytest.raises(sc.CheckpointDamagedError):
        watcher.look()
    (tmp_path / "step_4").rename(tmp_path / "gone")
    assert watcher.look() == 2
    model, optimizer = make_model(1)
    one_step(model, optimizer, sc.Gangs.local(), ends=False)
    with sc.CheckpointManager(tmp_path, sc.Gangs.local()) as checkpoints:
        checkpoints.save(4, {"model": model, "optimizer": optimizer})
    watcher.look()
    offered, promised, numbers = judge.wrong
    assert offered.startswith("step 4 is offered, and: ")
    assert promised == "step 4 was promised, and these are there: [1, 2]"
    assert numbers == "step 4 holds other numbers than that step of the undisturbed training"
