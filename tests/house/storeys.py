"""Who may import whom: imports go down the house only, and each foreign power has its own rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from tests.house.source import Source, imports

BASEMENT = {"errors", "optimizers", "split", "state", "streams"}
GROUND = {"gang", "storage", "format"}
"""None imports another."""
FIRST = {"engine", "run"}
"""`engine` and `run` do not know each other."""

BELOW: dict[str, set[str]] = {
    "errors": set(),
    "split": {"errors"},
    "optimizers": {"split"},
    "state": {"errors", "optimizers", "split"},
    "streams": {"errors", "state"},
    **dict.fromkeys(GROUND, BASEMENT),
    "engine": BASEMENT | GROUND,
    "run": BASEMENT | GROUND,
    "manager": BASEMENT | GROUND | {"engine", "run"},
    "testing": BASEMENT | GROUND | {"engine", "manager"},
    "tools": BASEMENT | GROUND | {"engine", "run", "manager"},
}
"""Room of `shardckpt` -> the rooms it may import, besides itself."""

TOP: dict[str, set[str]] = {
    "integrations": BASEMENT | GROUND | {"engine", "run", "manager", "tools"},
    "demo": BASEMENT | GROUND | {"engine", "run", "manager", "tools", "integrations", "testing"},
    "cli": BASEMENT | GROUND | {"engine", "run", "manager", "tools", "integrations", "demo"},
    "__main__": {"cli"},
}
"""The same for the top floor, whose rooms may also use the public face, `import shardckpt`, as a user does."""

FRAMEWORKS = (
    *("accelerate", "datasets", "lightning", "peft", "torchdata", "torchtitan", "transformers"),
    *("mlflow", "opentelemetry", "prometheus_client", "tensorboard", "wandb"),
)
"""Of training, and of watching it. `dependencies.py` sees that they are imported in functions only."""

POWERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(FRAMEWORKS, ("shardckpt/integrations/",)),
    "torch.distributed": (
        "shardckpt/gang/",
        "shardckpt/demo/",
        "shardckpt/integrations/",
        "shardckpt/testing/",
        # Where DCP's vocabulary or DTensor is spoken:
        "shardckpt/optimizers.py",
        "shardckpt/state.py",
        "shardckpt/engine/sharding.py",
        "shardckpt/engine/saving/again.py",
        "shardckpt/engine/saving/plan.py",
        "shardckpt/engine/loading/fetching/fetch.py",
        "shardckpt/engine/consolidated/flat.py",
        "shardckpt/engine/dcp.py",
        "shardckpt/engine/dcp/",
    ),
    "fsspec": ("shardckpt/storage/",),
    "s3fs": ("shardckpt/storage/",),
    "os.environ": ("shardckpt/gang/gangs.py", "shardckpt/cli/", "shardckpt/demo/"),
    "os.getenv": ("shardckpt/gang/gangs.py", "shardckpt/cli/", "shardckpt/demo/"),
    "typer": ("shardckpt/cli/",),
    "rich": ("shardckpt/cli/", "shardckpt/demo/"),
}
"""What only some files may touch -> those files, and folders (with a slash at the end)."""


def problems(files: Iterable[Source]) -> list[str]:
    """Every import or use that breaks a rule, with its place and the rule."""
    return sorted({*_storeys(files), *_powers(files)})


def _storeys(files: Iterable[Source]) -> Iterator[str]:
    for source in files:
        room = source.parts[1] if len(source.parts) > 1 else ""
        if room and room not in BELOW and room not in TOP:
            yield f"{source.path}: {room!r} has no place in the house; give it one in tests/house/storeys.py"
            continue
        allowed = {room} | BELOW.get(room, set()) | TOP.get(room, set())
        for line, name in imports(source):
            package, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if package != "shardckpt" or not room:  # the public face shows what lies in every room
                continue
            if target in BELOW or target in TOP:
                if target not in allowed:
                    yield f"{source.path}:{line}: {room} must not import {target}"
            elif room not in TOP and rest != "__version__":
                yield f"{source.path}:{line}: {room} must not import the public face; name the module instead"


def _powers(files: Iterable[Source]) -> Iterator[str]:
    for source in files:
        for line, name in [*imports(source), *_attributes(source.tree)]:
            for power, rooms in POWERS.items():
                if (name == power or name.startswith(power + ".")) and not source.path.startswith(rooms):
                    yield f"{source.path}:{line}: {power} is for {', '.join(rooms)} only"


def _attributes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every `a.b.c` in the code."""
    for node in ast.walk(tree):
        names: list[str] = []
        inner: ast.expr | ast.AST = node
        while isinstance(inner, ast.Attribute):
            names.append(inner.attr)
            inner = inner.value
        if names and isinstance(inner, ast.Name):
            yield inner.lineno, ".".join([inner.id, *reversed(names)])
