"""How much of each crash test is run, `--scale`, and what came of it, `--scorecard FILE`: a plugin of pytest.

    python -m pytest -m crash --scale 10                           ten times the sample of the suite
    python -m pytest -m crash --scale full --scorecard table.md    everything, and a table of it

A crash test asks `scale.runs(sample=..., full=...)` how many cases it is to try, and tells `scorecard.add` what it
counted before it asserts that nothing went wrong, so that what did go wrong is in the table as well. Rows of one name
are added up, whatever test and whatever worker of xdist they come from.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import hypothesis
import pytest

_OUTPUT = "shardckpt_scorecard"
"""The key of a worker's rows in what xdist carries to the controller."""
_SETTINGS = "_hypothesis_internal_use_settings"
"""Where hypothesis keeps the settings of a property test; read by its own plugin of pytest, too."""
_CARD: pytest.StashKey[Scorecard] = pytest.StashKey()
_BEGUN: pytest.StashKey[datetime] = pytest.StashKey()


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is to be run. `factor`: a multiple of the suite's sample; None for the full run."""

    factor: float | None

    def runs(self, *, sample: int, full: int) -> int:
        """How many cases to try, one at least: `sample` of them in the suite, `full` in a full run."""
        return full if self.factor is None else max(1, round(sample * self.factor))

    def __str__(self) -> str:
        return "full" if self.factor is None else f"{self.factor:g}"


@dataclass(slots=True)
class Row:
    """What a crash test counted. All but `runs` ought to be 0."""

    row: str
    runs: int = 0
    torn: int = 0
    """Checkpoints that were offered and were not whole, or gave other values than were saved."""
    lost: int = 0
    """Acknowledged checkpoints that are no longer there."""
    hangs: int = 0
    code: int = 0
    """Files that had code of theirs executed."""
    outside: int = 0
    """Reads or writes outside the checkpoint, deletions of what is not ours."""
    notes: str = ""

    def merge(self, other: Row) -> None:
        self.runs += other.runs
        self.torn += other.torn
        self.lost += other.lost
        self.hangs += other.hangs
        self.code += other.code
        self.outside += other.outside
        self.notes = "; ".join(note for note in dict.fromkeys(f"{self.notes}; {other.notes}".split("; ")) if note)


class Scorecard:
    """The rows of this process, and, on the controller of xdist, of all workers."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def add(
        self,
        row: str,
        *,
        runs: int,
        torn: int = 0,
        lost: int = 0,
        hangs: int = 0,
        code: int = 0,
        outside: int = 0,
        notes: str = "",
    ) -> None:
        """Add what was counted to the row of this name. `notes`: one short phrase; the same is noted once."""
        self.merge([Row(row, runs, torn, lost, hangs, code, outside, notes)])

    def merge(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.rows.setdefault(row.row, Row(row.row)).merge(row)

    def table(self) -> str:
        """In Markdown, sorted by name."""
        lines = ["| test | runs | torn | lost | hangs | code | outside | notes |", "|---|" + "---:|" * 6 + "---|"]
        for _, row in sorted(self.rows.items()):
            counts = (row.runs, row.torn, row.lost, row.hangs, row.code, row.outside)
            cells = (row.row, *(f"{count:,}" for count in counts), row.notes.replace("|", "\\|"))
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("crash tests")
    group.addoption(
        "--scale",
        type=_scale,
        default=Scale(1),
        metavar="N|full",
        help="how much of the crash tests: a multiple of the suite's sample, or 'full' (default: 1)",
    )
    group.addoption("--scorecard", type=Path, metavar="FILE", help="write what the crash tests counted, as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_CARD] = Scorecard()
    config.stash[_BEGUN] = datetime.now(timezone.utc)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only a larger run has: tests marked `larger`, of one marked `sampled(n)` most cases, and of a
    property test most examples."""
    factor = config.getoption("--scale").factor
    if factor is None or factor >= 2:
        return
    seen, left, kept = Counter[str](), list[pytest.Item](), list[pytest.Item]()
    tried = dict[Any, hypothesis.settings]()
    for item in items:
        marker = item.get_closest_marker("sampled")
        turn = 0
        if marker is not None:
            name = item.nodeid.partition("[")[0]
            turn, seen[name] = seen[name] % marker.args[0], seen[name] + 1
        (left if turn or item.get_closest_marker("larger") else kept).append(item)
        property_test = getattr(item, "function", None)
        if hasattr(property_test, _SETTINGS):
            tried.setdefault(property_test, getattr(property_test, _SETTINGS))
    for property_test, whole in tried.items():  # one function may be several items
        few = hypothesis.settings(whole, max_examples=examples(whole.max_examples))
        setattr(property_test, _SETTINGS, few)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def examples(whole: int) -> int:
    """How many examples of a property test a plain run tries: a third of them, but not less than 25 because of that."""
    return max(min(whole, 25), whole // 3)


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> Scale:
    """How much is to be run: `scale.runs(sample=20, full=1000)`."""
    given: Scale = request.config.getoption("--scale")
    return given


@pytest.fixture(scope="session")
def scorecard(request: pytest.FixtureRequest) -> Scorecard:
    """Where a crash test tells what it counted."""
    return request.config.stash[_CARD]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    rows = [asdict(row) for row in config.stash[_CARD].rows.values()]
    output: dict[str, Any] | None = getattr(config, "workeroutput", None)
    if output is not None:  # a worker of xdist
        output[_OUTPUT] = rows
        return
    file: Path | None = config.getoption("--scorecard")
    if file is not None:
        facts = _facts(config, failed=session.testsfailed)
        file.write_text("\n".join([*facts, "", config.stash[_CARD].table()]), encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """On the controller of xdist, for each worker. One that was killed has told nothing."""
    output: dict[str, Any] = getattr(node, "workeroutput", None) or {}
    node.config.stash[_CARD].merge(Row(**row) for row in output.get(_OUTPUT, ()))


def _scale(text: str) -> Scale:
    return Scale(None if text == "full" else float(text))


def _facts(config: pytest.Config, *, failed: int) -> list[str]:
    """When and where, in Markdown."""
    begun = config.stash[_BEGUN]
    minutes = (datetime.now(timezone.utc) - begun).total_seconds() / 60
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        f"{begun:%Y-%m-%d %H:%M} UTC, scale {config.getoption('--scale')}, {minutes:.0f} minutes, "
        f"{failed} tests failed, commit {_commit()}.",
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, torch {_version('torch')}.",
    ]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
