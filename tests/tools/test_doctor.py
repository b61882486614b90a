"""`examine`: what is found of machines and places, good and bad, and that nothing is left behind."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardckpt.errors import CheckpointLoadError
from shardckpt.storage.base import Storage
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.open import open_storage
from shardckpt.testing.faults import FailingStorage, on
from shardckpt.tools.examining import machine
from shardckpt.tools.examining.doctor import examine
from shardckpt.tools.examining.findings import Finding
from shardckpt.tools.examining.machine import examine_machine
from shardckpt.tools.examining.place import examine_place
from tests.run.making import walk
from tests.storage.conftest import place, s3, seaweedfs

__all__ = ["place", "s3", "seaweedfs"]  # fixtures

NBYTES = 100_000


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


class Careless(MemoryStorage):
    """Replaces what is there, and forgets to show it."""

    def put(self, key: str, parts: Any) -> int:
        self.delete([key])
        return super().put(key, parts)

    def list(self, prefix: str = "") -> list[str]:
        return [name for name in super().list(prefix) if name != "read"]

    def exchange_folders(self, one: str, other: str) -> bool:
        return False


class Elsewhen(MemoryObjects):
    """An object store of another time, that may know no condition."""

    def __init__(self, ahead: float, refuses: bool) -> None:
        super().__init__("store")
        self.ahead, self.refuses = ahead, refuses

    def modified(self, key: str) -> float:
        import time

        return time.time() + self.ahead

    def refuses_to_replace(self) -> bool:
        return self.refuses


def test_a_folder_of_this_machine(tmp_path: Path) -> None:
    found = examine(tmp_path / "not" / "yet", nbytes=NBYTES)
    names = by_name(found.findings)
    assert (found.ok, found.url) == (True, str(tmp_path / "not/yet"))
    place = ["space", "write once", "read after write", "rename", "exchange", "direct I/O", "clock", "small file"]
    assert [*names][-11:] == [*place, "folder sync", "rate of a write", "rate of a read"]
    assert names["space"].value == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.2)
    assert names["rate of a write"].value > 0
    assert "10 GB of state by one rank: about" in names["rate of a write"].advice
    assert names["clock"].what == "agrees with this machine's"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    examine(tmp_path / "there", nbytes=NBYTES)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("make", [MemoryStorage, MemoryObjects, lambda _: open_storage("memory://examined")])
def test_places_in_memory(make: Callable[[str], Storage]) -> None:
    storage = make("examined")
    found = by_name(examine_place(storage, nbytes=NBYTES))
    assert {finding.level for finding in found.values()} <= {"good", "note"}
    assert ("rename" in found) == isinstance(storage, MemoryStorage)
    assert [*walk(storage)] == []
    storage.close()


def test_a_place_that_keeps_no_promise() -> None:
    found = by_name(examine_place(Careless("careless"), nbytes=NBYTES))
    assert found["write once"].level == "problem"
    assert found["read after write"].what == "not seen at once: what was listed"
    assert found["exchange"].level == "note"


def test_what_fails_on_the_way_is_a_problem_and_the_rest_is_looked_at() -> None:
    inner = MemoryStorage("some")
    found = by_name(examine_place(FailingStorage(inner, on("replace"), error=PermissionError), nbytes=NBYTES))
    assert found["access"].level == "problem"
    assert "rate of a read" in found
    assert [*walk(inner)] == []


@pytest.mark.parametrize(
    ("ahead", "level"), [(-0.5, "good"), (70.0, "note"), (-1000.0, "problem"), (1000.0, "problem")]
)
def test_clocks_and_conditions(ahead: float, level: str) -> None:
    found = by_name(examine_place(Elsewhen(ahead, refuses=level == "good"), nbytes=NBYTES))
    assert found["clock"].level == level
    assert found["clock"].value == pytest.approx(ahead if level != "good" else 0, abs=0.5)
    assert found["conditional put"].level == ("good" if level == "good" else "note")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointLoadError, match="cannot write to"):
        examine(tmp_path / "file" / "run", nbytes=NBYTES)


def test_a_machine_with_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  2000000 kB\n",
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/memory.max": "1500000000\n",
        "sys/fs/cgroup/job/memory.current": "500000000\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(machine, "_version", {"torch": "2.3.1+cpu", "fsspec": None}.get)
    found = by_name(examine_machine(str(tmp_path)))
    assert found["memory"].what == "1 GB can be used now, as the limit of its control group allows"
    assert (found["open files"].level, "unlimited" in found["open files"].advice) == ("note", True)
    assert (found["shared memory"].level, found["torch"].level) == ("note", "problem")
    assert (found["fsspec"].what, "shardckpt[s3]" in found["s3fs"].advice) == ("is not installed", True)


@pytest.mark.s3
def test_a_real_object_store(seaweedfs: Any, place: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.secret_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", seaweedfs.endpoint)
    url = place(seaweedfs)
    found = examine(url, nbytes=NBYTES)
    names = by_name(found.findings)
    assert found.ok
    assert (names["conditional put"].level, names["clock"].level) == ("good", "good")
    assert seaweedfs.storage(url).list() == []
