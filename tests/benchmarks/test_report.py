"""States, tables, goals and pictures, from made-up samples."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from benchmarks.cells import Spread
from benchmarks.goals import goals_of, render_goals
from benchmarks.plots import can_plot, plot
from benchmarks.report import cases, render
from benchmarks.rounds import Results, Sample, Settings
from benchmarks.states import Shape, make

SHAPES = [Shape("A", 2_000_000, layers=2), Shape("B", 0, count=5), Shape("C", 1 << 16), Shape("D", 0, layers=1)]
PHASES = {"stall": 0.01, "stage": 0.1, "write": 0.5, "commit": 0.02, "total": 0.63}


def test_the_state_is_never_zero_and_follows_from_its_numbers() -> None:
    for shape in SHAPES:
        state, twin = (make(shape, rank=0, mesh=None) for _ in range(2))
        assert state.digests() == twin.digests()
        assert not any(torch.count_nonzero(local) < local.numel() / 2 for _, local in state.locals())
        state.fill(1)
        assert not state.digests().items() & twin.digests().items()


def test_a_training_step_changes_everything_in_the_end_and_nothing_before() -> None:
    state = make(SHAPES[0], rank=0, mesh=None)
    assert 1_900_000 < state.nbytes < 2_100_000
    before = state.digests()
    state.compute()
    assert state.digests() == before
    state.update()
    changed = [name for name, digest in state.digests().items() if digest != before[name]]
    assert len(changed) == len(before)


def test_a_shrunk_state_has_the_same_tensors_by_name() -> None:
    for shape in SHAPES:
        whole, shrunk = make(shape, rank=0, mesh=None), make(shape.shrunk(), rank=0, mesh=None)
        assert list(whole.tensors) == list(shrunk.tensors)
        assert shrunk.nbytes < whole.nbytes


def fill_shard(rank: int, world_size: int, folder: Path) -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world_size,))
    state = make(Shape("C", 9 * 4096), rank=rank, mesh=mesh)  # 9 rows: the last rank has fewer
    tensor = state.tensors["one.large"]
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor.clone()


def test_the_whole_is_the_same_on_any_mesh(ranks: Any) -> None:
    """Else a load on another number of ranks could not be verified."""
    whole = make(Shape("C", 9 * 4096), rank=0, mesh=None).tensors["one.large"]
    assert torch.equal(torch.cat(ranks.run(2, fill_shard)), whole)
    assert torch.equal(torch.cat(ranks.run(4, fill_shard)), whole)


def test_a_spread_counts_each_round_once() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([]) is None


def made_up(**changes: float) -> Results:
    """Samples of two rounds, ours and a peer's: what a run says that reaches every goal."""
    seconds = {"save": 1.0, "load": 1.0, "cold": 1.0, "reshard to 2": 0.5, "cached": 0.5, "own": 0.01} | changes
    samples = []
    for number in range(2):
        limits = {"write direct": 1.0e9, "read warm": 1.1e9, "read cold": 1.05e9}
        samples.append(Sample(number, "limits", "A, 1 GB", 1, "limits", limits, 0.0))
        for engine, times in (("shardckpt", 1.0), ("dcp.save", 10.0)):
            for measure, value in seconds.items():
                taken = {"seconds": [value * times], "first_s": value, "files": 2, "file_nbytes": 10**9,
                         "state_nbytes": 10**9, "tensors": 3, "peak_nbytes": 10**9, "read_nbytes": 10**9,
                         "phases": [PHASES, PHASES]}  # fmt: skip
                samples.append(Sample(number, engine, "A, 1 GB", 1, measure, taken, 0.5))
        for engine, times in (("shardckpt", 1.0), ("dcp.async_save, thread", 30.0)):
            told = {name: [0.01 * times] for name in ("blocked_s", "waited_s", "stall_s", "lost_s", "slowdown")}
            first = {f"first_{name}": values[0] for name, values in told.items()}
            rest = {"step_s": 0.2, "peak_nbytes": 10**9, "state_nbytes": 10**9, "phases": [PHASES, PHASES]}
            samples.append(Sample(number, engine, "A, 1 GB", 1, "stall", {**told, **first, **rest}, 0.5))
        samples += looped(number, 1.02, 1.5)
    engines = ("shardckpt", "dcp.save", "dcp.async_save, thread")
    settings = Settings((Shape("A", 10**9),), (1,), engines, 2, 2, targets=(2,))
    facts = dict.fromkeys(("date", "processor", "cores", "memory_gib", "kernel", "file system", "python", "torch",
                           "shardckpt"), "x")  # fmt: skip
    return Results(settings, facts, "python -m benchmarks", samples)


ENGINES_AND_SYNCS = (("shardckpt", "all"), ("dcp.async_save, thread", "files"))


def looped(number: int, *over_bare: float, label: str = "A, 1 GB", stall_s: float = 0.003) -> list[Sample]:
    """Of ours, and of a peer if there is a second ratio."""
    samples = []
    for (engine, synced), ratio in zip(ENGINES_AND_SYNCS, over_bare, strict=False):
        told = {"steps": 40, "plain_s": [9.9, 10.1], "bare_s": [11.0, 11.0], "saved_s": [11 * ratio, 11 * ratio],
                "over_plain": 1.1 * ratio, "over_bare": ratio, "bare_over_plain": 1.1, "lost_s": 11 * ratio - 10,
                "first_stall_s": 0.02, "stall_s": [stall_s] * 8, "bare_stall_s": [0.001] * 8, "end_s": [0.1, 0.3],
                "bare_end_s": [0.0, 0.0], "processor_s": 0.5, "bare_processor_s": 0.25, "file_nbytes": 1.01e9,
                "bare_file_nbytes": 1.0e9, "phases": [PHASES], "synced": synced}  # fmt: skip
        nbytes = round(float(label.split()[1]) * 1e9)
        samples.append(Sample(number, engine, label, 1, "loop", {**told, "state_nbytes": nbytes, "tensors": 3}, 0.5))
    return samples


def test_the_loop_is_shown_beside_bare_saves() -> None:
    text = render(made_up())
    assert "**Training loop of 40 steps, a save before every tenth**" in text
    table = text[text.index("**Training loop") :].split("\n\n")[1].splitlines()
    ours, theirs, bare = (line.split(" | ") for line in table[2:])
    assert ours[1:6] == ["all", "10.00 (10.00-10.00)", "11.22 (11.22-11.22)", "1.122 (1.122-1.122)",
                         "1.020 (1.020-1.020)"]  # fmt: skip
    assert ours[6:] == ["0.20 (0.20-0.20)", "20 (20-20)", "3.0 (3.0-3.0)", "500 (500-500)", "1010 |"]
    assert theirs[:2] == ["| dcp.async_save, thread", "files"]
    assert bare[:2] + bare[3:6] == ["| bare copy and write", "all", "11.00 (11.00-11.00)", "1.100 (1.100-1.100)", "1"]
    assert bare[7:] == ["", "1.0 (1.0-1.0)", "250 (250-250)", "1000 |"]


def test_a_stall_must_not_grow_with_the_state() -> None:
    results = made_up()
    small, large = Shape("A", 3 * 10**8), Shape("A", 3 * 10**9)
    results.settings = replace(results.settings, shapes=(large, Shape("A", 10**9), small))
    results.samples += looped(0, 1.0, label=small.label) + looped(0, 1.0, label=large.label, stall_s=0.006)
    (row,) = [line for line in render_goals(cases(results)).splitlines() if "steady stall in a training loop" in line]
    assert row == ("| A, 3 GB, 1 | steady stall in a training loop, against that of A, 0.3 GB | 2 x | at most 1.5 x "
                   "| **no** |")  # fmt: skip
    assert "against that of" not in render_goals(cases(made_up()))


def test_a_table_has_what_was_measured_and_no_empty_columns() -> None:
    text = render(made_up())
    for heading in ("Save, seconds", "Save while training goes on", "Load into the state", "another number of ranks"):
        assert f"**{heading}" in text or heading in text
    assert "| dcp.save | 10.00 (10.00-10.00) | 10.0 x |" in text
    assert "| shardckpt | 1 to 2 | 0.50 (0.50-0.50) | 1 | 2.00 x | 1.00 |" in text
    bare = made_up()
    bare.samples = [s for s in bare.samples if s.measure in ("save", "limits")]
    assert "not synced" not in render(bare)


def test_every_goal_is_met_or_said_to_be_missed() -> None:
    (case,) = cases(made_up())
    goals = {goal.what: goal for goal in goals_of(case)}
    assert len(goals) == 16
    assert [what for what, goal in goals.items() if not goal.is_met] == []
    assert goals["warm load, checked first, against dcp.load"].reached == 10.0
    assert goals["training loop with saves, over the loop without them plus the device's share"].reached == 1.02
    assert goals["bytes read over bytes needed, on 2 ranks"].reached == 1.0
    (case,) = cases(made_up(load=2.0, own=0.1))
    missed = [goal.what for goal in goals_of(case) if not goal.is_met]
    assert missed == ["warm load, checked first, against the read limit", "the engine's own processor time for a save"]
    assert render_goals([case]).count("**no**") == 2
    assert render_goals([]) == ""


@pytest.mark.skipif(not can_plot(), reason="matplotlib is not installed: pip install 'shardckpt[bench]'")
@pytest.mark.leaks(files=(sysconfig.get_paths()["purelib"],), why="matplotlib keeps its fonts open")
def test_pictures(tmp_path: Path) -> None:
    made = plot(made_up(), tmp_path / "plots")
    assert [path.name for path in made] == ["ratios_A_1GB_1.png", "timeline_A_1GB_1.png"]
    for path in made:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
