"""Each extra by itself, in an environment made for it: it does its work, and what is not there says how to get it.

    python launch/extras.py                  # all of pyproject.toml, one after the other; a quarter of an hour
    python launch/extras.py wandb mlflow     # these; "" is the package without any. Python 3.11 or newer

One environment is made with torch, and copied (by hard links) for each. A line for each: how long its installation
took, the frameworks that are there, how long `import shardckpt` takes beside torch. The exit status is 1 if something
is not as it should be. torchtitan imports triton, which torch for CPUs comes without; it is installed besides.
`--check EXTRA`, in such an environment, is what is asked of it.
"""

import importlib.util
import os
import pkgutil
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = {
    "transformers": "hf",
    **{name: name for name in ("accelerate", "peft", "datasets", "lightning", "torchtitan", "torchdata")},
    **{name: name for name in ("tensorboard", "wandb", "mlflow")},
    "opentelemetry.sdk": "opentelemetry",
    "prometheus_client": "prometheus",
}
"""Module -> the extra that brings it."""
STORAGES = {"s3fs": ("s3", "s3://bucket/a"), "gcsfs": ("gcs", "gs://bucket/a"), "adlfs": ("azure", "az://bucket/a")}
OTHERS = ("bench", "seaweed", "test", "testing")
"""Extras of what is done with this repository, or of servers to test against."""
TIMED = "import torch, time; t = time.perf_counter(); import shardckpt; print(time.perf_counter() - t)"


def main(extras: list[str]) -> int:
    """Makes an environment for each, checks it, and removes it."""
    with tempfile.TemporaryDirectory(prefix="shardckpt-extras-") as folder:
        base = Path(folder) / "base"
        run(sys.executable, "-m", "venv", base)
        run(*pip(base), "torch")
        run(*pip(base), ".")
        failed = [extra for extra in extras or all_extras() if not is_good(extra, base)]
    print("failed: " + ", ".join(map(repr, failed)) if failed else "all as it should be")
    return int(bool(failed))


def all_extras() -> list[str]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return ["", *(name for name in project["optional-dependencies"] if name not in OTHERS)]


def is_good(extra: str, base: Path) -> bool:
    place, began = base.with_name(extra or "without"), time.monotonic()
    try:
        run("cp", "-al", base, place)
        if extra:
            run(*pip(place), f".[{extra}]", *(("triton",) if extra == "torchtitan" else ()))
        took = time.monotonic() - began
        found = run(place / "bin" / "python", __file__, "--check", extra, at=place)
    except subprocess.CalledProcessError as error:
        print(f"{place.name}: failed: {error.cmd}\n{error.stderr[-3000:]}", flush=True)
        return False
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(f"{place.name}: {took:.0f} s; {found.splitlines()[-1]}", flush=True)
    return True


def pip(place: Path) -> list[str]:
    python = str(place / "bin" / "python")
    return [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", "docker/constraints.txt"]


def run(*command: object, at: Path = ROOT) -> str:
    """What it printed. Without a PYTHONPATH, which would bring in what is to be tested by its absence."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"WANDB_SILENT": "true"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=at, env=environment, capture_output=True, text=True, check=True).stdout


def check(extra: str) -> str:
    """In an environment that has this extra; AssertionError if something is wrong."""
    import shardckpt

    assert ROOT not in Path(shardckpt.__file__).parents, "it is the installed one that is to be tested"
    before = set(sys.modules)
    import shardckpt.integrations

    for module in pkgutil.walk_packages(shardckpt.integrations.__path__, "shardckpt.integrations."):
        importlib.import_module(module.name)
    brought = {name for name in FRAMEWORKS if name in sys.modules and name not in before}
    assert not brought, f"importing the integrations imports {brought}"
    there = [name for name in FRAMEWORKS if is_there(name)]
    expected = [name for name, its in FRAMEWORKS.items() if its == extra]
    assert set(expected) <= set(there), f"{expected} should be there"
    for name, its in FRAMEWORKS.items():
        ask(name, its, there)
    for package, (its, url) in STORAGES.items():
        ask_storage(package, its, url)
    use(extra)
    timed = [float(subprocess.check_output([sys.executable, "-c", TIMED], text=True)) for _ in range(5)]
    assert statistics.median(timed) < 0.05, timed
    there_too = ", ".join(there) or "none"
    return f"frameworks there: {there_too}; import shardckpt beside torch: {statistics.median(timed) * 1e3:.1f} ms"


def is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def ask(name: str, extra: str, there: list[str]) -> None:
    """For a framework: it is imported, or one error says what to install."""
    from shardckpt.integrations.frameworks import FrameworkMissingError, need

    said = ""
    try:
        need(name, extra=extra)
    except FrameworkMissingError as error:
        said = str(error)
    assert (name in there) == (said == ""), said or name
    assert not said or f"pip install 'shardckpt[{extra}]'" in said, said


def ask_storage(package: str, extra: str, url: str) -> None:
    from shardckpt.storage import open_storage

    said = ""
    try:
        open_storage(url).close()
    except ImportError as error:
        said = str(error)
    except ValueError:  # a client that wants an account
        assert is_there(package)
    assert not said or (not is_there(package) and f"pip install 'shardckpt[{extra}]'" in said), said


def use(extra: str) -> None:
    """A checkpoint in a program that has the extra, watched or fed by it; one without, if it is none of these."""
    import torch

    import shardckpt as sc

    model, folder = torch.nn.Linear(4, 4), Path(tempfile.mkdtemp(dir="."))
    state: dict[str, object] = {"model": model}
    if extra == "torchdata":
        from torchdata.stateful_dataloader import StatefulDataLoader

        state["data"] = StatefulDataLoader(range(8), 2)
        next(iter(state["data"]))
    with sc.CheckpointManager(folder / "run") as checkpoints:
        if extra in WATCHERS:
            checkpoints.subscribe(WATCHERS[extra](folder))
        failures: list[sc.SubscriberFailed] = []
        checkpoints.subscribe(lambda event: failures.append(event) if isinstance(event, sc.SubscriberFailed) else None)
        checkpoints.save(1, state).result()
        assert checkpoints.resume(state).step == 1
    assert not failures, failures


def tensorboard(folder: Path):
    from torch.utils.tensorboard import SummaryWriter

    from shardckpt.integrations.watching import TensorBoard

    return TensorBoard(SummaryWriter(folder))


def wandb(folder: Path):
    import wandb

    from shardckpt.integrations.watching import WandB

    return WandB(wandb.init(project="extras", mode="offline", dir=folder))


def mlflow(folder: Path):
    import mlflow

    from shardckpt.integrations.watching import MLflow

    mlflow.set_tracking_uri(f"sqlite:///{folder.absolute()}/mlflow.db")
    return MLflow(mlflow.start_run())


def prometheus(folder: Path):
    from shardckpt.integrations.watching import Prometheus

    return Prometheus(textfile=folder / "shardckpt.prom")


def opentelemetry(folder: Path):
    from shardckpt.integrations.watching import OpenTelemetry

    return OpenTelemetry()


WATCHERS = {made.__name__: made for made in (tensorboard, wandb, mlflow, prometheus, opentelemetry)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        print(check(sys.argv[2]))
    else:
        sys.exit(main(sys.argv[1:]))
