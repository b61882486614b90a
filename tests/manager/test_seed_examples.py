"""The example programs of fairseq2's documentation, as they stand but for import and constructor, alone and on ranks.

The blocks of `fairseq2_ckpt.rst` are put, unchanged, into one small training program. It is started twice: it trains,
saves, prunes, trains on; then it starts again, goes on from its checkpoint, and must come to the same numbers. Two
ranks are first started by torchrun; all others are processes of the pool with the environment that torchrun gives.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from shardckpt.testing.pool import ProcessPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # a start of torchrun, on a machine that may be busy

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = Path(__file__).with_name("fairseq2_ckpt.rst")
CONSTRUCTOR = 'ckpt_manager = CheckpointManager(Path("checkpoints"), gangs=root_gang)'
"""The only statement of the examples that is another one."""

PROGRAM = """
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardckpt import CheckpointLoadError, CheckpointManager, CheckpointNotFoundError, Gangs

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.manual_seed(int(os.environ["SEED"]))
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.LayerNorm(10), torch.nn.Linear(10, 3))
if world_size > 1:
    dist.init_process_group("gloo")
    fully_shard(model[0])
    fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
scores = {994: 0.9, 995: 0.1, 996: 0.8, 997: 0.2, 998: 0.7, 999: 0.6}
seen = {"losses": {}, "steps": []}


def train_step(number):
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
    loss = (model(inputs) - inputs[:, :3].flip(1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    seen["losses"][number] = loss.item()


root_gang = Gangs.from_env()
%(constructor)s
%(errors)s
step_nr = 993
%(load)s
resumed = step_nr == 1000
for step_nr in range(step_nr + 1, 1001):
    train_step(step_nr)
    if step_nr in scores:
        ckpt_manager.begin_checkpoint(step_nr)
        ckpt_manager.save_state({"model": model.state_dict(), "step_nr": step_nr})
        ckpt_manager.save_score(scores[step_nr], lower_better=True)
        ckpt_manager.commit_checkpoint()
if not resumed:
    valid_score = 0.5
%(save)s
%(keep_last)s
    seen["steps"].append(ckpt_manager.get_step_numbers())
%(keep_best)s
    seen["steps"].append(ckpt_manager.get_step_numbers())
    ckpt_manager.begin_checkpoint(1001)
%(consolidated)s
    ckpt_manager.commit_checkpoint()
%(errors_inside)s
for number in (1001, 1002, 1003):
    train_step(number)
seen["steps"].append(ckpt_manager.get_step_numbers())
whole = {name: getattr(value, "full_tensor", lambda: value)() for name, value in model.state_dict().items()}
moments = [value for own in optimizer.state.values() for value in own.values()]
moments = [value.full_tensor() if isinstance(value, DTensor) else value for value in moments]
seen["parameters"] = {name: value.flatten().tolist() for name, value in whole.items()}
seen["moments"] = [value.flatten().tolist() for value in moments]
seen["sharded"] = isinstance(next(model.parameters()), DTensor)
if resumed:
    if rank == 0:
        record = Path("checkpoints/step_1000/rank_0.pt")
        record.write_bytes(record.read_bytes()[:-100])
    if world_size > 1:
        dist.barrier()
%(errors_inside)s
Path(os.environ["NOTES"], f"{rank}.json").write_text(json.dumps(seen))
ckpt_manager.close()
if world_size > 1:
    dist.destroy_process_group()
"""


def blocks() -> dict[str, str]:
    """The code of the document, by what it is for; that of the first block is cut after its first statement."""
    found = re.findall(r"^\.\. code-block:: python\n\n((?:(?: {4}.*)?\n)+)", DOCUMENT.read_text(), re.MULTILINE)
    save, load, keep_last, keep_best, consolidated, errors = (textwrap.dedent(block) for block in found)
    first = ast.parse(save).body[0]
    assert ast.unparse(first).startswith("ckpt_manager = FileCheckpointManager(")
    rest = "\n".join(save.splitlines()[first.end_lineno or 0 :])
    inside = {"save": rest, "keep_last": keep_last, "keep_best": keep_best, "consolidated": consolidated}
    return {
        "constructor": CONSTRUCTOR,
        "load": load,
        "errors": errors,
        **{name: textwrap.indent(code, "    ") for name, code in {**inside, "errors_inside": errors}.items()},
    }


def run_by_torchrun(program: Path, ranks: int, environment: dict[str, str]) -> list[str]:
    """What was printed, by all ranks together."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(program)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(start, cwd=program.parent, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return [done.stdout]


def run_as_rank(rank: int, world_size: int, folder: Path, program: Path, environment: dict[str, str]) -> str:
    """The program as the main module of this process; gives what it printed."""
    before, place = dict(os.environ), Path.cwd()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.chdir(program.parent)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(program), run_name="__main__")
    finally:
        os.chdir(place)
        os.environ.clear()
        os.environ.update(before)
    return printed.getvalue()


def launch(pool: ProcessPool, program: Path, ranks: int, seed: int, port: int) -> tuple[list[dict[str, Any]], str]:
    """What every rank noted, and what all printed."""
    notes = program.parent / f"notes_{seed}"
    notes.mkdir()
    environment = {"SEED": str(seed), "NOTES": str(notes)}
    if ranks == 2 and seed == 0:
        printed = run_by_torchrun(program, ranks, environment)
    else:
        environment["MASTER_PORT"] = str(port)
        printed = pool.run(ranks, run_as_rank, program, environment, backend=None)
    return [json.loads((notes / f"{rank}.json").read_text()) for rank in range(ranks)], "".join(printed)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_programs_of_the_document(ranks: ProcessPool, tmp_path: Path, free_port: int, size: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM % blocks())
    first, printed = launch(ranks, program, size, 0, free_port)
    assert printed.count("Checkpoint not found") == size
    assert printed.count("No checkpoint found, starting fresh") == size
    assert "Error loading" not in printed
    for seen in first:
        assert seen["steps"] == [[996, 997, 998, 999, 1000], [997, 999, 1000], [997, 999, 1000, 1001]]
        assert seen["sharded"] == (size > 1)
    assert (tmp_path / "checkpoints/step_1000/score.txt").read_text() == "-0.5\n"
    model_alone = torch.load(tmp_path / "checkpoints/step_1001/model.pt", weights_only=True)
    assert [tuple(value.shape) for value in model_alone["model"].values()] == [
        (10, 6),
        (10,),
        (10,),
        (10,),
        (3, 10),
        (3,),
    ]

    again, printed = launch(ranks, program, size, 1, free_port)  # other parameters, until they are loaded
    assert printed.count("Restored checkpoint from step 1000") == size
    assert "found" not in printed
    assert printed.count("Error loading checkpoint: step 1000") == size  # of the damage at its end
    for before, after in zip(first, again, strict=True):
        assert sorted(map(int, after["losses"])) == [1001, 1002, 1003]
        assert {key: before["losses"][key] for key in after["losses"]} == after["losses"]
        assert before["parameters"] == after["parameters"]
        assert before["moments"] == after["moments"]
