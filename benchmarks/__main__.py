"""`python -m benchmarks`: options in, tables and a JSON file out."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from benchmarks.engines import ENGINES
from benchmarks.goals import render_goals
from benchmarks.loop import EVERY
from benchmarks.places import Place
from benchmarks.plots import can_plot, plot
from benchmarks.progress import Bar
from benchmarks.report import cases, render
from benchmarks.rounds import AFTER_SAVE, MEASURES, Noise, Results, Rounds, Settings
from benchmarks.states import Shape


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every engine's every measure was verified; 1 if one failed; 2 for a wrong option."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.plots and not can_plot():
        parser.error("--plots needs matplotlib: pip install 'shardckpt[bench]'")
    if given.report:
        _show([Results.decode(path.read_text()) for path in given.report], given.plots)
        return 0
    unknown = sorted(set(given.engines) - set(ENGINES))
    if unknown:
        parser.error(f"no engine is called {unknown[0]!r}; there are: {', '.join(ENGINES)}")
    try:
        noise = Noise(given.patience * 60, given.redo_above)
        rounds = Rounds(_settings(given), _root(given.root), given.json, noise=noise)
    except ValueError as error:
        parser.error(str(error))
    with Bar() as progress:
        for engine, why in rounds.results.skipped.items():
            progress.tell(f"{engine} is skipped: it {why}")
        results = rounds.run(progress)
    _show([results], given.plots)
    return 1 if results.failed else 0


def _show(several: Sequence[Results], plots: Path | None) -> None:
    for results in several:
        print(render(results))
    goals = render_goals([case for results in several for case in cases(results)])
    if goals:
        print(f"### Against the goals\n\n{goals}")
    for results in several if plots else ():
        assert plots is not None
        for path in plot(results, plots):
            print(path, file=sys.stderr)


def _root(text: str | None) -> Place:
    """`ValueError` for a place that processes do not share."""
    if text is None or "://" not in text:
        return Place(str(Path(text or tempfile.gettempdir()).expanduser().resolve()))
    if text.startswith("memory://"):
        raise ValueError("memory:// is not shared by the processes that measure; give a folder or a URL")
    return Place(text.removeprefix("file://") if text.startswith("file://") else text)


def _settings(given: argparse.Namespace) -> Settings:
    shapes = {
        shape.label: shape
        for name, gb in product(given.state, given.gb)
        for shape in [Shape(name, round(gb * 1e9), layers=given.layers, count=given.count, tokens=given.tokens)]
    }
    asked = {*given.measures, *(["save"] if {*AFTER_SAVE} & {*given.measures} else [])}
    return Settings(
        shapes=tuple(shapes.values()),
        ranks=tuple(dict.fromkeys(given.ranks)),
        engines=tuple(dict.fromkeys(given.engines)),
        rounds=given.rounds,
        saves=given.saves,
        steps=given.steps,
        measures=tuple(measure for measure in MEASURES if measure in asked),
        targets=tuple(dict.fromkeys(given.reshard)),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=(
            "Save and load the same state with shardckpt and with what people would use instead, by turns, each "
            "measure in a fresh process; compare what was loaded with what was saved; print medians, spreads and "
            "ratios beside what the machine itself can do."
        ),
        epilog=f"engines: {'; '.join(ENGINES)}",
    )
    parser.add_argument("--state", nargs="+", choices=("A", "B", "C", "D"), default=["A"], metavar="A|B|C|D",
                        help="A: a Llama-style model, bfloat16 with float32 AdamW moments; B: many tensors of 4 KB; "
                        "C: one large tensor; D: LoRA adapters with moments (default: A)")  # fmt: skip
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), metavar="NAME", help="default: all")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="MEASURE",
                        help=f"some of: {', '.join(MEASURES)} (default: all)")  # fmt: skip
    parser.add_argument("--ranks", nargs="+", type=_positive, default=[1], metavar="N",
                        help="processes; more than one are started by torchrun and shard by FSDP2 "
                        "(default: 1)")  # fmt: skip
    parser.add_argument("--reshard", nargs="+", type=_positive, default=[], metavar="N",
                        help="numbers of ranks that load what the others have saved (default: none)")  # fmt: skip
    parser.add_argument("--rounds", type=_positive, default=5, help="turns of each engine (default: 5)")
    parser.add_argument("--saves", type=_several, default=3,
                        help="saves of one process; the first is told apart (default: 3)")  # fmt: skip
    parser.add_argument("--steps", type=_tens, default=40,
                        help='of the training loop of "loop", with a save before every tenth '
                        "(default: 40)")  # fmt: skip
    parser.add_argument(
        "--gb",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="GB",
        help="sizes of A, and of C, over all ranks, in 10^9 bytes (default: 1)",
    )
    parser.add_argument(
        "--layers", type=_positive, default=8, help="of A, 8 make 300 tensors, and of D, 8 make 448 (default: 8)"
    )
    parser.add_argument("--count", type=_positive, default=20_000, help="tensors of B (default: 20000)")
    parser.add_argument("--tokens", type=_positive, default=128, help="of a training step of A (default: 128)")
    parser.add_argument("--root", metavar="PATH|URL",
                        help="a folder on the disk to measure, or a URL for fsspec, whose credentials and endpoint "
                        "come from the environment (default: where temporary files go)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="keep every sample here, after every job; a run that was cut off goes on "
                        "from it")  # fmt: skip
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw PNG files there; needs matplotlib")
    parser.add_argument("--patience", type=float, default=0.0, metavar="MINUTES",
                        help="how long a job waits at most until others leave the processors alone")  # fmt: skip
    parser.add_argument("--redo-above", type=float, metavar="CORES",
                        help="take samples of FILE again in whose time others used more cores than this")  # fmt: skip
    parser.add_argument("--report", nargs="+", type=Path, metavar="FILE",
                        help="measure nothing, print the tables of these JSON files")  # fmt: skip
    return parser


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _several(text: str) -> int:
    return _at_least(text, 2)


def _tens(text: str) -> int:
    number = _at_least(text, EVERY)
    if number % EVERY:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {EVERY}")
    return number


def _at_least(text: str, least: int) -> int:
    number = int(text) if text.isdigit() else 0
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least {least}")
    return number


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a `kill` cleans up as Ctrl-C does
    sys.exit(main())
