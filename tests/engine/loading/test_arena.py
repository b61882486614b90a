"""Memory of our own that is fetched into: summed up once, in small pages, and given back as it is copied."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from shardckpt.engine.loading.fetching import arena, pieces, touching
from shardckpt.engine.loading.fetching.arena import Arena
from shardckpt.engine.loading.integrity import Region
from shardckpt.engine.saving.image import Image
from shardckpt.storage import LocalStorage
from shardckpt.storage.posix.syscalls import in_memory
from shardckpt.testing.faults import flip_byte
from tests.engine.loading.archives import HERE, PATIENT, Summing, need, write

MIB = 1 << 20


def test_what_was_summed_up_as_it_came_is_not_gone_over_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is believed: neither a sound file is refused nor a damaged one taken."""
    tensors = [torch.arange(3000.0), torch.zeros(0), torch.ones(7)]
    records = write(tmp_path / "step_1", "a.pt", tensors)
    monkeypatch.setattr(arena, "crc32", lambda _: pytest.fail("summed up twice"))
    for flipped, found in ((None, []), (records[0].at + 11_000, ["a.pt"])):
        if flipped is not None:
            flip_byte(tmp_path / "step_1" / "a.pt", flipped)
        fetch = Arena(Summing(tmp_path), HERE)
        for record in records[::2]:
            fetch.add(need("a.pt", record), record)
        assert fetch.read(()) == (found, [])
        fetch.release()


def test_memory_that_is_touched_once_is_of_small_pages(tmp_path: Path) -> None:
    """Other than that of saves, which is kept."""
    (record,) = write(tmp_path / "step_1", "a.pt", [torch.zeros(1 << 20)])
    fetch, kept = Arena(LocalStorage(tmp_path), HERE), Image()
    fetch.add(need("a.pt", record), record)
    fetch.read(())
    kept.reserve(4 * MIB)
    assert "hg" not in flags_at(fetch._image)
    assert "hg" in flags_at(kept) or not Path("/sys/kernel/mm/transparent_hugepage").exists()
    fetch.release()
    kept.release()


def test_memory_is_given_back_as_it_is_copied_and_none_of_what_is_still_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large and small tensors, some in parts, which go to the state in two turns."""
    monkeypatch.setattr(touching, "_LEAST", 1)
    monkeypatch.setattr(pieces, "PIECE", 100_000)
    tensors = [torch.randn(rows, 100) for rows in (3000, 5, 1, 3000, 200, 40, 3000, 7)]
    records = write(tmp_path / "step_1", "a.pt", tensors)
    columns = [(0, 100), (0, 100), (0, 100), (10, 60), (0, 100), (20, 3), (0, 100), (0, 100)]
    fetch, memory = Arena(LocalStorage(tmp_path), HERE), list[int]()
    items = []
    for tensor, record, (first, count) in zip(tensors, records, columns, strict=True):
        what = need("a.pt", record, Region((0, first), (len(tensor), count)))
        items.append((fetch.add(what, record), torch.empty(len(tensor), count), tensor[:, first : first + count]))
    assert fetch.read(())[0] == []
    for turn in (items[1::2], items[::2]):
        fetch.fill([(item, place) for item, place, _ in turn], timeout=PATIENT)
        assert all(torch.equal(place, expected) for _, place, expected in turn)
        memory.append(sum(in_memory(fetch._image.tensor(at, torch.uint8, (1,)).data_ptr())
                          for at in range(0, fetch._nbytes, 4096)))  # fmt: skip
    fetch.release()
    pages = fetch._nbytes // 4096
    assert memory[0] < 0.9 * pages
    assert memory[1] < 0.3 * pages, "what does not begin or end a piece of 24 pages is not there"


def flags_at(image: Image) -> list[str]:
    """What the kernel knows of this memory."""
    address, flags = image.tensor(0, torch.uint8, (1,)).data_ptr(), list[str]()
    for line in reversed(Path("/proc/self/smaps").read_text().splitlines()):
        if line.startswith("VmFlags:"):
            flags = line.split()[1:]
        extent = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if extent and int(extent[1], 16) <= address < int(extent[2], 16):
            return flags
    raise AssertionError("it is not mapped")
