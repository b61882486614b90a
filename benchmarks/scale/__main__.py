"""`python -m benchmarks.scale`: what saves and loads cost on many ranks, measured in one process without them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.limits import machine_facts
from benchmarks.scale.cases import Case, measure, meshes
from benchmarks.scale.history import Asked, ask
from benchmarks.scale.jobs import LLAMA_405B, Mesh, Model
from benchmarks.scale.report import plot, render
from benchmarks.scale.world import World

_RANKS = (8, 64, 512, 4096, 16384)


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 for a wrong option."""
    parser = _parser()
    given = parser.parse_args(argv)
    world = World(**{field.name: getattr(given, field.name) for field in fields(World)})
    cases: list[Case] = []
    facts = machine_facts(Path())
    try:
        for name, ranks, mesh, others, model in _jobs(given):
            print(f"{name}, {ranks} ranks: {mesh.label}", file=sys.stderr, flush=True)
            peers, projected = ranks <= given.peers, world if "405B" in name else None
            cases.append(measure(name, mesh, model, others=others, peers=peers, world=projected))
            _keep(given.json, facts, world, cases, {})
    except ValueError as error:
        parser.error(str(error))
    history = ask(given.steps) if given.steps else {}
    _keep(given.json, facts, world, cases, history)
    command = " ".join(["python -m benchmarks.scale", *(sys.argv[1:] if argv is None else argv)])
    print(
        f"{facts['date']}, {facts['processor']}, {facts['cores']} cores, Python {facts['python']}, torch "
        f"{facts['torch']}. Processor time, and bytes.\n\n    {command}\n"
    )
    print(render(cases, history, given.steps, world))
    if given.plot and not plot(cases, given.plot):
        print("no picture: pip install 'shardckpt[bench]' for matplotlib", file=sys.stderr)
    return 0


def _keep(path: Path | None, facts: Any, world: World, cases: Sequence[Case], history: Mapping[str, Asked]) -> None:
    """What there is so far: a run of hours may be cut off."""
    if path is not None:
        content = {"machine": facts, "world": asdict(world), "cases": [case.encode() for case in cases]}
        content["history"] = {what: asdict(asked) for what, asked in history.items()}
        path.write_text(json.dumps(content, indent=1, default=str))


def _jobs(given: argparse.Namespace) -> Iterator[tuple[str, int, Mesh, list[Mesh], Model]]:
    for kind in given.models:
        for ranks in given.ranks:
            if kind == "405B":
                pp = min(given.pp or 16, max(1, ranks // 8))
                yield "405B", ranks, *meshes(ranks, pp=pp), LLAMA_405B
                continue
            for tensors in given.tensors:
                experts = 64 if kind == "moe" else 0
                model = Model.with_tensors(tensors, experts=experts, width=8192 if experts else 16_384)
                name = f"{kind}, {tensors:,} tensors"
                yield name, ranks, *meshes(ranks, experts=bool(experts), pp=given.pp or 1), model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=_positive, nargs="+", default=_RANKS, help="how many there are to be")
    add("--models", nargs="+", choices=("dense", "moe", "405B"), default=("dense",), help="what is saved")
    add("--tensors", type=_positive, nargs="+", default=(1000,), help="of dense and moe, with the moments")
    add("--pp", type=_positive, help="pipeline stages (if not given: 1, of 405B up to 16)")
    add("--peers", type=int, default=0, metavar="RANKS", help="plan with DCP, too, on up to so many ranks")
    add("--steps", type=int, default=10_000, help="of a run that is listed and pruned; 0: none")
    add("--json", type=Path, help="write everything here, too")
    add("--plot", type=Path, help="draw a picture (PNG)")
    world: Any = parser.add_argument_group("assumptions, for projections (bytes/s, s)")
    for field in fields(World):
        kind = int if field.type == "int" else float
        world.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=" ")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
