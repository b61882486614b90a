"""Fetching from a file system without memory for it: any region to any place, and what may happen in between."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt as sc
from shardckpt.engine.coordinates import Coordinates
from shardckpt.engine.loading.fetching import borrow, pieces, straight
from shardckpt.engine.loading.fetching.arena import Arena
from shardckpt.engine.loading.fetching.borrow import Borrowed, fetch_from
from shardckpt.engine.loading.fetching.fetch import Fetched
from shardckpt.engine.loading.fetching.straight import Straight
from shardckpt.engine.loading.integrity import Region, runs_of
from shardckpt.engine.loading.sources import Sources
from shardckpt.errors import CheckpointLoadError
from shardckpt.format.checksum import crc32
from shardckpt.format.index import StoredRecord
from shardckpt.format.manifest import decode_manifest
from shardckpt.storage import LocalStorage, MemoryObjects, Read
from shardckpt.storage.posix.map import MappedFile
from shardckpt.testing.gangs import run_ranks
from tests.engine.loading.archives import HERE, PATIENT, Summing, need, write
from tests.engine.states import assert_same, snapshot, train, training

MIB = 1 << 20


def borrowed(root: Path, files: dict[str, list[StoredRecord]]) -> tuple[Borrowed, list[Fetched]]:
    fetch = Borrowed(LocalStorage(root), HERE)
    return fetch, [fetch.add(need(name, record), record) for name, records in files.items() for record in records]


def test_each_kind_of_storage_has_its_way(tmp_path: Path) -> None:
    write(tmp_path / "step_1", "a.pt", [torch.ones(3)])
    local = fetch_from(LocalStorage(tmp_path), HERE, ["a.pt"])
    assert isinstance(local, Borrowed)
    assert isinstance(fetch_from(MemoryObjects(), HERE, ["a.pt"]), Arena)


class NothingToMap(LocalStorage):
    """On some file systems nothing can be mapped."""

    def lend(self, key: str) -> MappedFile:
        raise OSError(19, "No such device")


def test_a_file_system_that_maps_nothing_is_read(tmp_path: Path) -> None:
    state, other = training(), training(seed=1)
    train(state, 1)
    train(other, 1)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state).result()
    assert isinstance(fetch_from(NothingToMap(tmp_path), HERE, ["model.pt"]), Arena)
    with sc.CheckpointManager(NothingToMap(tmp_path)) as checkpoints:
        checkpoints.load(1, other)
    assert_same(snapshot(state), snapshot(other))


@pytest.mark.parametrize("at", [0, 1, 4, 6, 8])
def test_elements_need_not_lie_at_multiples_of_their_size(tmp_path: Path, at: int) -> None:
    """Those of shardckpt do; of a file by others nobody knows. Here the last of them ends the file."""
    tensor = torch.randn(6, 5)
    content = bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "a.pt").write_bytes(b"x" * at + content)
    record = StoredRecord("float32", (6, 5), at, len(content), crc32(content))
    fetch, part = borrowed(tmp_path, {"a.pt": [record]})[0], Region((2, 1), (3, 2))
    items = [fetch.add(need("a.pt", record), record), fetch.add(need("a.pt", record, part), record)]
    places = [torch.zeros(6, 5), torch.zeros(3, 2)]
    assert fetch.read(())[0] == []
    fetch.fill(list(zip(items, places, strict=True)), timeout=PATIENT)
    fetch.release()
    assert torch.equal(places[0], tensor)
    assert torch.equal(places[1], tensor[2:5, 1:3])


@st.composite
def regions(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=4)))
    if not all(shape):
        return shape, Region((0,) * len(shape), shape)  # nobody asks for a part of nothing
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    lengths = tuple(draw(st.integers(1, size - at)) for size, at in zip(shape, start, strict=True))
    return shape, Region(start, lengths)


@settings(deadline=None, max_examples=150)
@given(st.lists(regions(), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_any_region_to_any_place(tmp_path_factory: pytest.TempPathFactory, wanted: Any, seed: int) -> None:
    """The arena and the borrowed files agree, with each other and with what was written; tiny pieces, so that many."""
    rng, root = random.Random(seed), tmp_path_factory.mktemp("root")
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex64, torch.bool]
    tensors = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(rng.choice(dtypes)) for shape, _ in wanted
    ]
    records = write(root / "step_1", "a.pt", tensors, gap=rng.choice([0, 70, 5000]))
    storage = LocalStorage(root)
    whole = (root / "step_1" / "a.pt").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", 64)
        patch.setattr(borrow, "_CLOSE", rng.choice([0, 100, 1 << 16]))
        for fetch in (Arena(storage, HERE), Arena(Summing(root), HERE), Borrowed(storage, HERE)):
            items = [
                fetch.add(need("a.pt", record, region), record)
                for record, (_, region) in zip(records, wanted, strict=True)
            ]
            frame = bytearray(4)
            damaged, partial = fetch.read([Read("step_1/a.pt", len(whole) - 4, memoryview(frame))])
            assert not damaged
            assert len(partial) == sum(not item.is_whole for item in items)
            assert frame == b"tail"
            places = [place_for(item, tensor.dtype, rng) for item, tensor in zip(items, tensors, strict=True)]
            fetch.fill(list(zip(items, places, strict=True)), timeout=PATIENT)
            for item, tensor, place in zip(items, tensors, places, strict=True):
                at, n = item.need.region.start, item.need.region.lengths
                expected = tensor[tuple(slice(a, a + b) for a, b in zip(at, n, strict=True))]
                assert torch.equal(place, expected.to(place.dtype))
            fetch.release()
        patch.setattr(straight, "_PIECE", rng.choice([64, 1 << 20]))
        patch.setattr(straight, "_SHORT", rng.choice([0, 50]))
        read_straight(Straight(storage, HERE), [*zip(tensors, records, wanted, strict=True)], rng)


def read_straight(fetch: Straight, wanted: list[Any], rng: random.Random) -> None:
    """The same, where it can be, to the same places without a copy; neighbours of a place stay as they are."""
    placed, items = [], []
    for tensor, record, (_, region) in wanted:
        what = need("a.pt", record, region)
        place = place_for(Fetched(what, record, runs_of(record, region)), tensor.dtype, rng)
        placed.append(
            (place, tensor[tuple(slice(a, a + b) for a, b in zip(region.start, region.lengths, strict=True))])
        )
        if not fetch.take(what, record, place):
            items.append((fetch.add(what, record), place))
    damaged, partial = fetch.read([])
    assert not damaged
    before = [place.clone() for place, _ in placed]
    found = fetch.stream(PATIENT)
    assert not found[0]
    late = {id(place) for _, place in items}
    for (place, expected), old in zip(placed, before, strict=True):
        assert torch.equal(place, old if id(place) in late else expected)
    fetch.fill(items, timeout=PATIENT)
    for place, expected in placed:
        assert torch.equal(place, expected.to(place.dtype))
    wholes = sum(region.lengths == record.shape for _, record, (_, region) in wanted)
    assert len(partial) + len(found[1]) == len(wanted) - wholes
    fetch.release()


def place_for(item: Fetched, dtype: torch.dtype, rng: random.Random) -> torch.Tensor:
    """Memory of the region's shape: as it is, transposed, every second element of something, or of another dtype."""
    shape, how = item.need.region.lengths, rng.randrange(4)
    if how == 1 and len(shape) > 1:
        return torch.zeros(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
    if how == 2 and shape:
        return torch.zeros((*shape[:-1], 2 * shape[-1]), dtype=dtype)[..., ::2]
    return torch.zeros(shape, dtype=torch.complex128 if how == 3 else dtype)


def test_a_damaged_byte_is_found_and_nothing_is_copied(tmp_path: Path) -> None:
    tensors = [torch.randn(300, 500), torch.randn(7), torch.randn(3 * MIB // 4)]
    records = write(tmp_path / "step_1", "a.pt", tensors)
    with open(tmp_path / "step_1" / "a.pt", "r+b") as file:
        file.seek(records[2].at + records[2].nbytes - 1)
        file.write(b"\x99")
    fetch, _ = borrowed(tmp_path, {"a.pt": records})
    assert fetch.read([]) == (["a.pt"], [])
    fetch.release()


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(5, 5))  # clocks of files are coarse; a test is quick


def cut_off(path: Path) -> None:
    os.truncate(path, 1000)


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").replace(path)


@pytest.mark.parametrize("change", [overwrite, cut_off])
def test_a_file_that_is_written_to_between_check_and_copy(tmp_path: Path, change: Callable[[Path], None]) -> None:
    records = write(tmp_path / "step_1", "a.pt", [torch.randn(300, 500)])
    fetch, (item,) = borrowed(tmp_path, {"a.pt": records})
    assert fetch.read([]) == ([], [])
    change(tmp_path / "step_1" / "a.pt")
    place = torch.zeros(300, 500)
    with pytest.raises(CheckpointLoadError, match=r"a\.pt .* was written to, or replaced.*load again"):
        fetch.fill([(item, place)], timeout=PATIENT)
    assert not place.any(), "of this file nothing had been copied yet"
    fetch.release()


@pytest.mark.parametrize("change", [Path.unlink, replace])
def test_a_file_that_is_deleted_between_check_and_copy(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """As by the retention of another job: what was checked is what is copied."""
    tensor = torch.randn(300, 500)
    fetch, (item,) = borrowed(tmp_path, {"a.pt": write(tmp_path / "step_1", "a.pt", [tensor])})
    assert fetch.read([]) == ([], [])
    change(tmp_path / "step_1" / "a.pt")
    place = torch.zeros(300, 500)
    fetch.fill([(item, place)], timeout=PATIENT)
    assert torch.equal(place, tensor)
    fetch.release()


@pytest.mark.parametrize("change", [Path.unlink, replace, overwrite])
def test_more_files_than_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(borrow, "_KEPT", 2)
    tensors = [torch.randn(50) for _ in range(6)]
    files = {f"{n}.pt": write(tmp_path / "step_1", f"{n}.pt", [tensor]) for n, tensor in enumerate(tensors)}
    for tamper in (False, True):
        before = len(os.listdir("/proc/self/fd"))
        fetch, items = borrowed(tmp_path, files)
        assert fetch.read([]) == ([], [])
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * 2, "a file and its folder, of two"
        if tamper:
            change(tmp_path / "step_1" / "4.pt")
            with pytest.raises(CheckpointLoadError, match=r"4\.pt"):
                fetch.fill([(item, torch.zeros(50)) for item in items], timeout=PATIENT)
        else:
            places = [torch.zeros(50) for _ in items]
            fetch.fill(list(zip(items, places, strict=True)), timeout=PATIENT)
            assert all(torch.equal(*pair) for pair in zip(tensors, places, strict=True))
        fetch.release()


class HangingFile(MappedFile):
    """Once it has been told to, it brings nothing until the gate is opened: a server that does not answer."""

    hangs: threading.Event
    gate: threading.Event

    def bring(self, start: int, nbytes: int) -> None:
        if self.hangs.is_set():
            assert self.gate.wait(60)
        super().bring(start, nbytes)

    def take(self, start: int, into: Sequence[memoryview], *, wait: bool) -> bool:
        return (wait or not self.hangs.is_set()) and super().take(start, into, wait=wait)


class HangingStorage(LocalStorage):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.hangs, self.gate = threading.Event(), threading.Event()

    def lend(self, key: str) -> MappedFile:
        found = HangingFile(self._open_file(key), key)
        found.hangs, found.gate = self.hangs, self.gate
        return found


@pytest.mark.leaks(threads=("shardckpt-",), why="they end once the gate is open, a moment after the test")
@pytest.mark.parametrize("kind", [Borrowed, Straight])
def test_a_copy_that_hangs_ends_in_time_and_late_bytes_reach_nothing(tmp_path: Path, kind: type[Borrowed]) -> None:
    tensors = [torch.randn(MIB) for _ in range(4)]
    records, storage = write(tmp_path / "step_1", "a.pt", tensors), HangingStorage(tmp_path)
    fetch, places = kind(storage, HERE), [torch.zeros(MIB) for _ in records]
    items = []
    for record, place in zip(records, places, strict=True):
        if not (isinstance(fetch, Straight) and fetch.take(need("a.pt", record), record, place)):
            items.append((fetch.add(need("a.pt", record), record), place))
    assert fetch.read([]) == ([], [])
    storage.hangs.set()
    limit = timedelta(seconds=0.3)
    late = partial(fetch.stream, limit) if isinstance(fetch, Straight) else partial(fetch.fill, items, timeout=limit)
    with pytest.raises(CheckpointLoadError, match=r"took longer than 0\.3 s.*do not go on with it"):
        late()
    left = [thread for thread in threading.enumerate() if thread.name.startswith("shardckpt-")]
    assert left
    storage.gate.set()
    for thread in left:
        thread.join(30)
        assert not thread.is_alive()
    assert not any(place.any() for place in places)
    fetch.release()


class WatchedFile(MappedFile):
    """Notes that its bytes were looked at."""

    looked_at: threading.Event

    def bring(self, start: int, nbytes: int) -> None:
        self.looked_at.set()
        super().bring(start, nbytes)


class TamperingStorage(LocalStorage):
    """While it is on, a file is written to after its bytes were looked at, and before they are for the second time."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.on, self.looked_at = False, threading.Event()

    def lend(self, key: str) -> MappedFile:
        if self.on and self.looked_at.is_set():
            overwrite(Path(self.path_of(key)))
        found = WatchedFile(self._open_file(key), key)
        found.looked_at = self.looked_at
        return found


def test_a_copy_that_breaks_off_is_an_error_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No damage, for `resume` must not go on with another step and a state that nobody knows; a load puts it right."""
    monkeypatch.setattr(borrow, "_KEPT", 0)

    def act(gangs: sc.Gangs) -> str:
        rank, storage = gangs.root.rank, TamperingStorage(tmp_path)
        state = {"own": {"position": torch.full((5,), rank)}}
        with sc.CheckpointManager(storage, gangs, timeout=PATIENT) as checkpoints:
            checkpoints.save(1, state).result()
            checkpoints.save(2, state).result()
            state["own"]["position"].zero_()
            storage.on = rank == 1
            with pytest.raises(sc.CheckpointLoadError) as caught:
                checkpoints.resume(state)
            storage.on = False
            assert not isinstance(caught.value, sc.CheckpointDamagedError)
            assert checkpoints.load(1, state).step == 1
            assert state["own"]["position"].tolist() == [rank] * 5
        return str(caught.value)

    for message in run_ranks(3, act):
        assert "step 2 was not loaded" in message
        assert "rank 1" in message
        assert "rank_1.pt" in message
        assert "was written to" in message


def test_a_state_made_in_inference_mode(tmp_path: Path) -> None:
    """Its tensors may be changed in that mode only, which threads do not inherit."""
    with torch.inference_mode(), sc.CheckpointManager(tmp_path) as checkpoints:
        state = {"w": torch.randn(3, 5)}
        before = state["w"].clone()
        checkpoints.save(1, state).result()
        state["w"].zero_()
        checkpoints.load(1, state)
        assert torch.equal(state["w"], before)


def test_parameters_that_want_gradients(tmp_path: Path) -> None:
    layer = torch.nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": layer}).result()
        layer(torch.ones(4)).sum().backward()
        with torch.no_grad():
            layer.weight.zero_()
        checkpoints.load(1, {"model": layer})
    assert torch.equal(layer.weight, before)
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf
    layer(torch.ones(4)).sum().backward()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of memory")
def test_a_load_needs_no_memory_for_the_state(tmp_path: Path) -> None:
    state = {"w": torch.randn(36 * MIB), "many": {str(n): torch.randn(MIB // 64) for n in range(64)}}
    expected = state["w"].clone()
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state).result()
    state["w"].fill_(0.0)
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.load(1, state)  # what is touched or imported at the first load only
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        checkpoints.load(1, state)
        used = memory("VmHWM") - before
    assert torch.equal(state["w"], expected)
    assert used < 70 * MIB, "of 160 MiB"


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


class CountingSources(Sources):
    """How often somebody goes through all names."""

    searches = 0

    def names(self) -> Iterator[str]:
        self.searches += 1
        return super().names()


def test_as_many_parts_as_tensors(tmp_path: Path) -> None:
    """Every tensor of a nested dict is a part of its own: no search for each (20,000 of them took minutes)."""
    table = {f"{n:02d}": {"w": torch.ones(1), "w.x": torch.ones(1), "wx": n} for n in range(40)}
    with sc.CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"table": table, "tab": torch.ones(2)}).result()
    manifest = decode_manifest((tmp_path / "step_1" / "manifest.json").read_bytes())
    sources = CountingSources(manifest, Coordinates(0, 1, 0, 1, (0,)))
    names = list(Sources.names(sources))
    assert len(names) == 121
    for prefix in ("", "t", "tab", "table", "table.0", "table.07", "table.07.w", "table.07.w.x", "elsewhere", *names):
        expected = [name for name in names if name == prefix or name.startswith(f"{prefix}.")]
        assert sources.under(prefix) == expected
    assert sources.searches == 1
