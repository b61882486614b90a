"""What this machine gives a training job: versions, processors, memory, limits. Reads /proc and /sys; no torch."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from shardckpt.storage.transfer.several import processors
from shardckpt.tools.examining.findings import Finding, bytes_text

_LEAST = {"torch": "2.7", "fsspec": "2025.3"}
_EXTRAS = {"s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure"}
"""Package -> the extra of ours that brings it."""
_FEW_FILES = 4096
_SMALL_SHM = 1 << 30


def examine_machine(root: str = "/") -> Iterator[Finding]:
    """All findings of this machine. `root`: below which /proc, /sys and /dev lie."""
    yield from _versions()
    yield Finding("processors", "good", f"{processors()} for this process", value=processors())
    yield _memory(Path(root))
    yield _shared_memory(Path(root) / "dev/shm")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _open_files(soft, hard)


def _versions() -> Iterator[Finding]:
    system = f"Python {platform.python_version()}, {platform.system()} {platform.release()}"
    yield Finding("shardckpt", "good", f"{version('shardckpt')}, {system}")
    for package, least in _LEAST.items():
        found = _version(package)
        if found is None:
            yield Finding(package, "problem", "is not installed", "pip install shardckpt brings it")
        elif _numbers(found) < _numbers(least):
            yield Finding(package, "problem", found, f"at least {least} is needed")
        else:
            yield Finding(package, "good", found)
    for package, extra in _EXTRAS.items():
        found = _version(package)
        if found is not None:
            yield Finding(package, "good", found)
        elif package == "s3fs":
            yield Finding(package, "note", "is not installed", f"for s3:// URLs: pip install 'shardckpt[{extra}]'")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.partition("+")[0].split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)


def _memory(root: Path) -> Finding:
    """What may be used now, by the machine and by the limits of the control groups that this process is in."""
    facts = dict(line.split(":", 1) for line in (_text(root / "proc/meminfo") or "").splitlines() if ":" in line)
    room = {"the machine": int(facts.get("MemAvailable", "0 kB").split()[0]) * 1024}
    for limit, used in _groups(root):
        if limit:
            room["the limit of its control group"] = max(0, limit - used)
    whose = min(room, key=lambda name: room[name])
    what = f"{bytes_text(room[whose])} can be used now, as {whose} allows"
    advice = "a save keeps one copy of a rank's state in memory; SavePolicy(staging='none') needs none"
    return Finding("memory", "good", what, advice, room[whose], "B")


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each control group from this process's own upwards; version 2, then 1."""
    paths = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in _lines(root / "proc/self/cgroup")}
    two, one = root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory"
    own = paths.get("", "/").strip("/")
    for folder in [own, *(str(above) for above in Path(own).parents)]:
        yield _number(two / folder / "memory.max"), _number(two / folder / "memory.current")
    yield _number(one / "memory.limit_in_bytes"), _number(one / "memory.usage_in_bytes")


def _shared_memory(path: Path) -> Finding:
    try:
        found = os.statvfs(path)
    except OSError:
        return Finding(
            "shared memory", "note", f"there is no {path}", "data loaders and NCCL use it: mount a tmpfs there"
        )
    nbytes = found.f_blocks * found.f_frsize
    free = found.f_bavail * found.f_frsize
    what = f"{path} has {bytes_text(nbytes)}, {bytes_text(free)} of it free"
    if nbytes < _SMALL_SHM:
        advice = "data loaders and NCCL may need more: docker run --shm-size 8g, or an emptyDir of medium Memory"
        return Finding("shared memory", "note", what, advice, free, "B")
    return Finding("shared memory", "good", what, "", free, "B")


def _open_files(soft: int, hard: int) -> Finding:
    if soft == resource.RLIM_INFINITY:
        return Finding("open files", "good", "as many as are wanted")
    what = f"{soft} at once"
    if soft < _FEW_FILES:
        most = "unlimited" if hard == resource.RLIM_INFINITY else hard
        advice = f"loading a checkpoint of many ranks may want more: ulimit -n 65536 (this user may set up to {most})"
        return Finding("open files", "note", what, advice, soft)
    return Finding("open files", "good", what, "", soft)


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _lines(path: Path) -> list[str]:
    return [line for line in (_text(path) or "").splitlines() if line.count(":") >= 2]


def _number(path: Path) -> int:
    """0 where there is none, or it is "max"."""
    text = (_text(path) or "").strip()
    return int(text) if text.isdigit() else 0
