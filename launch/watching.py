"""Train, save, and see that on every dashboard there is: `python launch/watching.py runs/watched`.

In a program of yours it is the line of the tool that you have. Each needs its extra: `pip install 'shardckpt[wandb]'`.
"""

import shutil
import sys
from pathlib import Path

import mlflow
import torch
import wandb
from torch.utils.tensorboard import SummaryWriter

import shardckpt as sc
from shardckpt.integrations.watching import MLflow, OpenTelemetry, Prometheus, TensorBoard, WandB

root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/watched").absolute()
root.mkdir(parents=True, exist_ok=True)
mlflow.set_tracking_uri(f"sqlite:///{root}/mlflow.db")


def upload(event: sc.Committed) -> None:
    """Wherever yours is to go. It may take long, or fail: no checkpoint is concerned, and the dashboards tell of it."""
    there = root / "uploaded" / f"step_{event.step}"
    shutil.copytree(event.url, there, ignore=shutil.ignore_patterns("*.tmp"))  # a score that is just being written


model = torch.nn.Linear(64, 64)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
state = {"model": model, "optimizer": optimizer}
with (
    SummaryWriter(root / "tensorboard") as writer,
    wandb.init(project="tiny", mode="offline", dir=root) as wandb_run,
    mlflow.start_run() as mlflow_run,
    sc.CheckpointManager(root / "run", keep=sc.KeepLast(2)) as checkpoints,  # the last: it is closed first
):
    checkpoints.subscribe(TensorBoard(writer))
    checkpoints.subscribe(WandB(wandb_run))
    checkpoints.subscribe(MLflow(mlflow_run))
    checkpoints.subscribe(Prometheus(textfile=root / "shardckpt.prom"))
    checkpoints.subscribe(OpenTelemetry())
    checkpoints.subscribe(sc.SaveLog(root / "run" / "saves.jsonl"))
    checkpoints.on_commit(upload)
    resumed = checkpoints.resume(state)
    for step in range(resumed.step + 1 if resumed else 1, 41):
        inputs = torch.randn(32, 64)
        loss = (model(inputs) - inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        writer.add_scalar("loss", loss.item(), step)
        wandb_run.log({"loss": loss.item()}, step=step)
        if step % 10 == 0:
            checkpoints.save(step, state)
            checkpoints.save_score(loss.item(), step=step)
