"""`python -m benchmarks`: options in, tables and a JSON file out."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.engines import ENGINES
from benchmarks.report import render
from benchmarks.rounds import MEASURES, Noise, Results, Rounds, Settings
from benchmarks.states import Shape


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every engine's every measure was verified; 1 if one failed; 2 for a wrong option."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.report:
        for path in given.report:
            print(render(Results.decode(path.read_text())))
        return 0
    unknown = sorted(set(given.engines) - set(ENGINES))
    if unknown:
        parser.error(f"no engine is called {unknown[0]!r}; there are: {', '.join(ENGINES)}")
    root = given.root or Path(tempfile.gettempdir())
    try:
        noise = Noise(given.patience * 60, given.redo_above)
        rounds = Rounds(_settings(given), root.resolve(), given.json, noise=noise)
    except ValueError as error:
        parser.error(str(error))
    for engine, why in rounds.results.skipped.items():
        print(f"{engine} is skipped: it {why}", file=sys.stderr)
    results = rounds.run()
    print(render(results))
    return 1 if results.failed else 0


def _settings(given: argparse.Namespace) -> Settings:
    nbytes = round(given.gb * 1e9)
    shapes = tuple(
        Shape(name, nbytes, layers=given.layers, count=given.count, tokens=given.tokens)
        for name in dict.fromkeys(given.state)
    )
    return Settings(
        shapes=shapes,
        ranks=tuple(dict.fromkeys(given.ranks)),
        engines=tuple(dict.fromkeys(given.engines)),
        rounds=given.rounds,
        saves=given.saves,
        measures=tuple(measure for measure in MEASURES if measure in given.measures),
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
    parser.add_argument("--state", nargs="+", choices=("A", "B"), default=["A"], metavar="A|B",
                        help="A: a Llama-style model, bfloat16 with float32 AdamW moments; B: many tensors of 4 KB "
                        "(default: A)")  # fmt: skip
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), metavar="NAME", help="default: all")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="MEASURE",
                        help=f"some of: {', '.join(MEASURES)} (default: all)")  # fmt: skip
    parser.add_argument("--ranks", nargs="+", type=_positive, default=[1], metavar="N",
                        help="processes; more than one are started by torchrun and shard by FSDP2 "
                        "(default: 1)")  # fmt: skip
    parser.add_argument("--rounds", type=_positive, default=5, help="turns of each engine (default: 5)")
    parser.add_argument("--saves", type=_several, default=3,
                        help="saves of one process; the first is told apart (default: 3)")  # fmt: skip
    parser.add_argument("--gb", type=float, default=1.0, help="size of A over all ranks, in 10^9 bytes (default: 1)")
    parser.add_argument("--layers", type=_positive, default=8, help="of A; 8 make 300 tensors (default: 8)")
    parser.add_argument("--count", type=_positive, default=20_000, help="tensors of B (default: 20000)")
    parser.add_argument("--tokens", type=_positive, default=128, help="of a training step of A (default: 128)")
    parser.add_argument("--root", type=Path, help="a folder on the disk to measure (default: where temporary files go)")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="keep every sample here, after every job; a run that was cut off goes on "
                        "from it")  # fmt: skip
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


def _at_least(text: str, least: int) -> int:
    number = int(text) if text.isdigit() else 0
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least {least}")
    return number


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a `kill` cleans up as Ctrl-C does
    sys.exit(main())
