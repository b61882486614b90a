"""Adapters of PEFT, trained for real: the base is stored once, either comes back alone, the merged model goes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.storage.local import LocalStorage
from shardckpt.tools.verify import verify
from tests.engine.frozen.lora import is_adapter
from tests.engine.frozen.test_frozen import blobs, nbytes

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

pytestmark = pytest.mark.xdist_group("peft")


def tuned(seed: int = 0, *, base_seed: int = 1) -> dict[str, Any]:
    """A small Llama with LoRA on its attention, as a program hands it in."""
    torch.manual_seed(base_seed)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=256, num_key_value_heads=4, max_position_embeddings=64, **shape)
    base = transformers.LlamaForCausalLM(config)
    torch.manual_seed(seed + 100)
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": sc.RngState()}


def train(state: dict[str, Any], steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        words = torch.randint(0, 256, (2, 16))
        loss = state["model"](input_ids=words, labels=words).loss
        loss.backward()
        state["optimizer"].step()
        state["scheduler"].step()
        state["optimizer"].zero_grad()
        losses.append(loss.item())
    return losses


def test_ten_steps_take_less_than_a_seventh_of_the_bytes_and_go_on_to_the_last_bit(tmp_path: Path) -> None:
    state = tuned()
    for folder, frozen in (("full", ()), ("shared", ("*",))):
        with sc.CheckpointManager(tmp_path / folder) as checkpoints:
            for step in range(1, 11):
                if folder == "shared" or step == 1:
                    train(state, 1)
                checkpoints.save(step, state, frozen=frozen).result()
    full, shared = LocalStorage(tmp_path / "full"), LocalStorage(tmp_path / "shared")
    assert nbytes(shared) <= 0.15 * nbytes(full)
    assert len(blobs(shared)) == 1
    assert verify(shared).ok
    expected, other = train(state, 3), tuned(seed=5, base_seed=9)
    with sc.CheckpointManager(tmp_path / "shared") as checkpoints:
        assert checkpoints.resume(other).step == 10
    assert train(other, 3) == expected


@pytest.mark.parametrize("wanted", ["base", "adapter", "both"])
def test_base_or_adapter_or_both(tmp_path: Path, wanted: str) -> None:
    state = tuned()
    train(state, 2)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(2, state, frozen=("*",)).result()
    other = tuned(seed=5, base_seed=9)
    before = {name: value.clone() for name, value in other["model"].state_dict().items()}
    adapters = ["model." + name for name in before if is_adapter(name)]
    choice = {"base": {"include": ["model"], "exclude": adapters}, "adapter": {"include": adapters}, "both": {}}[wanted]
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.load(2, {"model": other["model"]}, policy=sc.LoadPolicy(**choice))
    saved = state["model"].state_dict()
    for name, value in other["model"].state_dict().items():
        loaded = wanted == "both" or (wanted == "adapter") == is_adapter(name)
        assert torch.equal(value, saved[name] if loaded else before[name]), name


def test_the_adapter_alone_is_what_peft_itself_would_save(tmp_path: Path) -> None:
    state = tuned()
    train(state, 2)
    own = peft.get_peft_model_state_dict(state["model"])
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(2, {"adapter": own}).result()
    fresh = tuned(seed=5)
    loaded = {name: torch.zeros_like(value) for name, value in own.items()}
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.load(2, {"adapter": loaded})
    peft.set_peft_model_state_dict(fresh["model"], loaded)
    words = torch.arange(16)[None]
    assert torch.equal(fresh["model"](input_ids=words).logits, state["model"](input_ids=words).logits)


@pytest.mark.leaks(threads=("tqdm_monitor",), why="transformers shows a bar while it loads")
def test_the_merged_model_goes_out_and_comes_in_without_peft(tmp_path: Path) -> None:
    state = tuned()
    train(state, 2)
    with sc.CheckpointManager(tmp_path / "run") as checkpoints:
        checkpoints.save(2, state, frozen=("*",)).result()
    other = tuned(seed=5, base_seed=9)
    with sc.CheckpointManager(tmp_path / "run") as checkpoints:
        checkpoints.load(2, {"model": other["model"]})
    words = torch.arange(16)[None]
    wanted = state["model"].eval()(input_ids=words).logits
    merged = other["model"].merge_and_unload()
    merged.config.save_pretrained(tmp_path / "merged/cc")
    with sc.CheckpointManager(tmp_path / "merged") as checkpoints:
        checkpoints.save(2, {"model": merged}).result()
    sc.export(tmp_path / "merged", tmp_path / "out")
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(back(input_ids=words).logits, wanted, atol=1e-5)
    assert not [name for name in back.state_dict() if is_adapter(name)]
