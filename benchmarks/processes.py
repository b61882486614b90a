"""The processes of a job, and what the rest of the machine does meanwhile."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.job import Task

_DEADLINE_S = 900.0
"""For one job: whatever hangs must not hang the others."""


class JobFailedError(Exception):
    """A job ended without a result; the message holds the end of what it printed."""


def run_job(task: Task, ranks: int, folder: Path) -> dict[str, Any]:
    """Start the ranks, wait for them, and give what rank 0 found out."""
    file, log, result = folder / "task.json", folder / "log", folder / "result.json"
    file.write_text(task.encode())
    result.unlink(missing_ok=True)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *start, "-m", "benchmarks.job", str(file)]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment()
        )
        status: int | str
        try:
            status = process.wait(_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            status = f"none within {_DEADLINE_S:.0f} s"
        except BaseException:
            process.terminate()  # torchrun then ends its ranks; killed, it would leave them behind
            process.wait()
            raise
    if status or not result.exists():
        raise JobFailedError(f"exit status {status}\n{log.read_text(errors='replace')[-3000:]}")
    values: dict[str, Any] = json.loads(result.read_text())
    return values


def environment() -> dict[str, str]:
    """Ours, with this package to be found from anywhere."""
    here = str(Path(__file__).resolve().parent.parent)
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def command_line() -> str:
    return "python -m benchmarks " + " ".join(f'"{word}"' if " " in word else word for word in sys.argv[1:])


class Clock:
    """Starts when made; tells how long ago that was, and how much others have made of the processors since."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy_s(), _own_s()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def others(self) -> float:
        """Cores, on average. What our children used counts as ours once they have ended."""
        return max(0.0, (_busy_s() - self._busy) - (_own_s() - self._own)) / max(self.elapsed_s, 0.01)


def wait_until_quiet(patience_s: float) -> None:
    """Return when other programs use less than a third of one core for two seconds, or patience is at an end."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        clock = Clock()
        time.sleep(2)
        if clock.others < 0.33:
            return


def _busy_s() -> float:
    """Seconds that all processors together have worked since the machine started (user, nice, system, irq, steal)."""
    fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields)) - idle) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in own)
