"""The examples of fairseq2's documentation run as they stand, but for the import and the constructor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
PROGRAM = REPOSITORY / "tests" / "fairseq2" / "program.py"


def run(root: Path, size: int) -> list[dict[str, Any]]:
    """What each rank saw."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    done = subprocess.run(
        [*start, str(PROGRAM), str(root)], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((root / f"seen_{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_examples_of_the_documentation(tmp_path: Path, size: int) -> None:
    """Started twice: the second time it goes on from the last checkpoint."""
    first, again = run(tmp_path, size), run(tmp_path, size)
    for seen in (first, again):
        assert all(rank == seen[0] for rank in seen)
        assert seen[0]["told"] == ["Checkpoint not found"]  # 2000 was deleted; 1000 has the best score
    assert (first[0]["restored"], again[0]["restored"]) == (0, 3000)
    assert first[0]["kept"] == again[0]["kept"] == [1000, 2000, 3000]
    assert again[0]["losses"][0] < first[0]["losses"][0]
    names = {path.name for path in (tmp_path / "step_3000").iterdir()}
    ranks = {f"rank_{rank}.pt" for rank in range(size)}
    assert names == {"manifest.json", "score.txt", "model.pt", *ranks}
    assert (tmp_path / "step_3000" / "score.txt").read_text() == "-3000.0\n"
    whole = torch.load(tmp_path / "step_3000" / "model.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in whole["model"].items()} == {
        "0.weight": (32, 8), "0.bias": (32,), "2.weight": (8, 32), "2.bias": (8,),
    }  # fmt: skip
