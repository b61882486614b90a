"""Trains with Ray Train: `python launch/ray/train.py ROOT LAST_STEP --workers 2`, also behind `ray job submit ... --`.

It starts the same program as everything here, `launch/train.py`, on each of Ray's workers. When a worker or its node is
lost, Ray starts all of them again (`max_failures` times), and they go on from the newest step. ROOT is an absolute path
that all nodes share, or a URL; Ray's own checkpoints are not used, and its storage only holds its notes about the run.

Needs `pip install 'ray[train]'` (tried with 2.60).
"""

import argparse
import runpy
import sys
import tempfile
from pathlib import Path

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

PROGRAM = Path(__file__).resolve().parents[1] / "train.py"  # at the same place on all nodes


def train(config: dict) -> None:
    """On each worker. Ray has made the process group; `Gangs.from_env` finds it, and talks over gloo groups of its own.

    This is not the main thread, where alone signals can be handled: no last save when a worker is told to stop.
    """
    sys.argv = [config["program"], config["root"], str(config["last_step"])]
    runpy.run_path(config["program"], run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="where the checkpoints go")
    parser.add_argument("last_step", type=int)
    parser.add_argument("--workers", type=int, default=2, help="processes, over all nodes")
    parser.add_argument("--gpus", action="store_true", help="one GPU for each of them")
    parser.add_argument(
        "--storage", default=tempfile.gettempdir() + "/ray-runs", help="for Ray's notes; shared, if nodes are several"
    )
    given = parser.parse_args()
    trainer = TorchTrainer(
        train,
        train_loop_config={"program": str(PROGRAM), "root": given.root, "last_step": given.last_step},
        torch_config=TorchConfig(backend="gloo"),  # what train.py speaks; nccl for a model on GPUs
        scaling_config=ray.train.ScalingConfig(num_workers=given.workers, use_gpu=given.gpus),
        run_config=ray.train.RunConfig(
            name="train", storage_path=given.storage, failure_config=ray.train.FailureConfig(max_failures=10)
        ),
    )
    trainer.fit()  # raises if it failed more often than that


if __name__ == "__main__":
    main()
