"""Adapters of PEFT, trained for real: the base is stored once, either comes back alone, the merged model goes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.run.catalog import Catalog
from shardckpt.storage.local import LocalStorage
from shardckpt.tools.verify import verify
from tests.engine.frozen.lora import is_adapter
from tests.engine.frozen.test_frozen import blobs, nbytes
from tests.storage.conftest import place, s3
from tests.storage.s3server import S3Server

__all__ = ["place", "s3"]  # fixtures

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

pytestmark = [
    pytest.mark.xdist_group("peft"),
    pytest.mark.leaks(threads=("tqdm_monitor",), why="transformers shows a bar while it loads"),
]


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


def test_the_merged_model_goes_out_and_comes_in_without_peft(tmp_path: Path) -> None:
    """From the checkpoint alone: no model is made, and PEFT is not asked. It is what PEFT makes of it, bit for bit."""
    state, cc = tuned(), tmp_path / "run/cc"
    train(state, 2)
    state["model"].config.save_pretrained(cc)
    state["model"].peft_config["default"].save_pretrained(cc)
    with sc.CheckpointManager(tmp_path / "run") as checkpoints:
        checkpoints.save(2, state, frozen=("*",)).result()
    sc.merge_lora(tmp_path / "run", tmp_path / "out")
    words = torch.arange(16)[None]
    tuned_logits = state["model"].eval()(input_ids=words).logits
    merged = state["model"].merge_and_unload()
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(back) is type(merged)
    assert back.state_dict().keys() == merged.state_dict().keys()
    assert all(torch.equal(value, merged.state_dict()[name]) for name, value in back.state_dict().items())
    assert torch.allclose(back(input_ids=words).logits, tuned_logits, atol=1e-5)


@pytest.mark.s3
def test_on_an_object_store(s3: S3Server, place: Callable[[S3Server], str], tmp_path: Path) -> None:
    """The base is put once and outlives the steps that go; training goes on to the last bit; and it can be merged."""
    state, url = tuned(), place(s3)
    storage = s3.storage(url)
    with sc.CheckpointManager(storage, keep=sc.KeepLast(2)) as checkpoints:
        for step in (1, 2, 3):
            train(state, 1)
            checkpoints.save(step, state, frozen=("*",)).result()
    assert Catalog(storage).steps() == [2, 3]
    assert len(blobs(storage)) == 1
    assert verify(storage).ok
    expected, other = train(state, 2), tuned(seed=5, base_seed=9)
    with sc.CheckpointManager(storage) as checkpoints:
        assert checkpoints.resume(other).step == 3
    config = other["model"].peft_config["default"].to_dict()
    means = sc.Means(storage_options=dict(s3.options))
    sc.merge_lora(url, tmp_path / "out.pt", form="pt", config=config, means=means)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert train(other, 2) == expected
    with sc.CheckpointManager(storage) as checkpoints:
        checkpoints.load(3, {"model": other["model"]})
    wanted = other["model"].merge_and_unload().state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
