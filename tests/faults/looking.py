"""What it costs to look whether the root is shared: `python -m tests.faults.looking [FOLDER]`, as root.

At a manager's first look at its root, once; milliseconds, the median of 15 (and the least and the most), rank 0's.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import shardckpt as sc
from shardckpt.manager.sharing.check import check_shared
from shardckpt.storage.local import LocalStorage
from shardckpt.testing.pool import ProcessPool
from tests.faults.nodes import with_own_mounts

LONG = timedelta(seconds=60)


def look(rank: int, size: int, folder: Path, root: Path, two_sites: bool) -> list[float]:
    """On two sites, all ranks but the first see mounts of their own: each is a node by itself."""

    def act() -> list[float]:
        gangs, took_ms = sc.Gangs.from_env(), list[float]()
        for number in range(15):
            gangs.root.enter(f"look {number}", timeout=LONG)
            began = time.perf_counter()
            check_shared(gangs.root, LocalStorage(root), timeout=LONG)
            took_ms.append(1e3 * (time.perf_counter() - began))
        gangs.close()
        return took_ms

    return with_own_mounts(act) if two_sites and rank else act()


def main() -> None:
    with ProcessPool() as pool, tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
        for ranks in (2, 4):
            for nodes, two_sites in ((1, False), (ranks, True)):
                took = pool.run(ranks, look, Path(folder) / "run", two_sites)[0]
                spread = f"({min(took):.1f}-{max(took):.1f})"
                print(f"{ranks} ranks on {nodes} nodes: {statistics.median(took):.1f} ms {spread}", flush=True)


if __name__ == "__main__":
    main()
