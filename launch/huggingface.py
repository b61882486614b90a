"""Hugging Face's Trainer: `torchrun --nproc-per-node 2 launch/huggingface.py`, or without torchrun. Stop it, start it.

Two arguments, if any: where the checkpoints go (a path, or any URL that fsspec opens), and the last step. What differs
from a program without shardckpt is where `Trainer` comes from; `checkpoints=` may be left out for a local `output_dir`.
"""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from shardckpt.demo.text import read_text
from shardckpt.integrations.huggingface import Trainer

root, last_step = (sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 2 else ("runs/huggingface", 200)

args = TrainingArguments(
    "runs/huggingface" if "://" in root else root,
    max_steps=last_step,
    save_steps=20,
    save_total_limit=3,
    logging_steps=20,
    learning_rate=1e-3,
    use_cpu=not torch.accelerator.is_available(),
    report_to=[],
)
text = torch.from_numpy(read_text()[: 64 * 4000].copy()).long().view(-1, 64)
rows = [{"input_ids": row, "labels": row} for row in text]
config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)

trainer = Trainer(GPT2LMHeadModel(config), args, train_dataset=rows, checkpoints=root)
trainer.train(resume_from_checkpoint="auto")  # the newest good step, or a fresh start
print(f"at step {trainer.state.global_step}", f"(resumed at {trainer.resumed.step})" if trainer.resumed else "")
