"""What is missing, damaged, or of another job is an error on all ranks, and never part of a state.

fairseq2's manager took a missing rank file for an empty one, dropped the state of ranks that there are no more, loaded
flipped bytes, let `EOFError` through, and ran code that lay in a file.
"""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt as sc
from shardckpt.format.checksum import crc32
from shardckpt.format.manifest import decode_manifest, encode_manifest
from shardckpt.testing.faults import flip_byte, truncate
from tests.manager.transactions import Size, equal, on_ranks, state_of, transact

TWO = Size(2)
ALIKE = {"model", "epoch"}
FILES = ("rank_0.pt", "rank_1.pt", "model.pt", "replicated.pt")


def given(gangs: sc.Gangs, step: int) -> dict[str, Any]:
    return state_of(gangs, ALIKE, base=100_000 * step)


def save(manager: sc.CheckpointManager, gangs: sc.Gangs, step: int) -> None:
    manager.begin_checkpoint(step)
    manager.save_state(given(gangs, step), replicated_keys=ALIKE)
    manager.save_metadata({"of": step, "ids": torch.arange(3)})
    manager.commit_checkpoint()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two ranks with the steps 1 and 2."""
    on_ranks(TWO, tmp_path, lambda manager, gangs: [save(manager, gangs, step) for step in (1, 2)])
    return tmp_path


def empty(path: Path) -> None:
    truncate(path, 0)


def cut(path: Path) -> None:
    truncate(path, path.stat().st_size // 2)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(10))


def flip(path: Path) -> None:
    flip_byte(path, path.stat().st_size // 2)


def other(path: Path) -> None:
    path.write_bytes((path.parent.parent / "step_1" / path.name).read_bytes())


HARM: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": empty,
    "cut off": cut,
    "too long": grow,
    "flipped": flip,
    "of another step": other,
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(run: Path, name: str, harm: str) -> None:
    HARM[harm](run / "step_2" / name)

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        for _ in range(2):
            with pytest.raises(sc.CheckpointDamagedError, match=name) as caught:
                manager.load_checkpoint(2)
            assert isinstance(caught.value, sc.CheckpointLoadError)
            assert caught.value.step == 2
        equal(manager.load_last_checkpoint(), (1, given(gangs, 1)))  # and the log says why it is not 2
        assert manager.get_step_numbers() == [1, 2]
        save(manager, gangs, 2)
        equal(manager.load_last_checkpoint(), (2, given(gangs, 2)))

    on_ranks(TWO, run, act)


def test_every_byte_is_looked_at(tmp_path: Path) -> None:
    """Of tensors, of values, and of what zip tools and torch need around them."""
    folder, rng = tmp_path / "step_2", random.Random(0)

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> list[tuple[str, int]]:
        save(manager, gangs, 2)
        unseen = []
        for name in ("rank_0.pt", "model.pt", "replicated.pt"):
            nbytes = (folder / name).stat().st_size
            for offset in [0, nbytes - 1, *(rng.randrange(nbytes) for _ in range(60))]:
                flip_byte(folder / name, offset)
                try:
                    manager.load_checkpoint(2)
                    unseen.append((name, offset))
                except sc.CheckpointDamagedError:
                    flip_byte(folder / name, offset)
        equal(manager.load_checkpoint(2), given(gangs, 2))
        return unseen

    assert on_ranks(Size(1), tmp_path, act) == [[]]


@pytest.mark.parametrize("harm", sorted(HARM.keys() - {"of another step"}))
def test_damaged_metadata(run: Path, harm: str) -> None:
    HARM[harm](run / "step_2" / "metadata.pt")

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        with pytest.raises(sc.CheckpointDamagedError, match=r"metadata\.pt") as caught:
            manager.load_metadata(2)
        assert caught.value.step == 2
        equal(manager.load_metadata(1), {"of": 1, "ids": torch.arange(3)})

    on_ranks(TWO, run, act)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04N.", b'{"format": 99}'], ids=str)
def test_a_damaged_record(run: Path, content: bytes) -> None:
    (run / "step_2" / "manifest.json").write_bytes(content)

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        for load in (manager.load_checkpoint, manager.load_metadata):
            with pytest.raises(sc.CheckpointLoadError, match="step 2") as caught:
                load(2)
            assert caught.value.step == 2
        equal(manager.load_last_checkpoint(), (1, given(gangs, 1)))

    on_ranks(TWO, run, act)


def test_no_checkpoint_and_no_good_one(run: Path) -> None:
    for step in (1, 2):
        (run / f"step_{step}" / "rank_1.pt").unlink()

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        with pytest.raises(sc.CheckpointNotFoundError) as missing:
            manager.load_checkpoint(3)
        assert missing.value.step == 3
        with pytest.raises(sc.CheckpointNotFoundError):
            manager.load_metadata(3)
        with pytest.raises(sc.CheckpointLoadError, match="but there are 2 others"):
            manager.load_last_checkpoint()

    on_ranks(TWO, run, act)
    with sc.CheckpointManager(run / "nothing here", sc.Gangs.local()) as manager:
        assert manager.get_step_numbers() == []
        with pytest.raises(sc.CheckpointNotFoundError):
            manager.load_last_checkpoint()


EVERYTHING = ("model.layer.weight", "model.layer.bias", "optimizer.state.0.exp_avg", "step_nr", "epoch")
OTHERS: list[tuple[Size, Size, set[str], tuple[str, ...]]] = [
    # saved on, loaded on, declared replicated, keys that keep it from being loaded
    (Size(2), Size(4), {"*"}, ()),
    (Size(2), Size(1), {"*"}, ()),
    (Size(4), Size(2), {"*"}, ()),
    (Size(1), Size(2), set(), ()),
    (Size(2, 2), Size(1, 2), {"*"}, ()),
    (Size(1, 2), Size(4, 2), {"*"}, ()),
    (Size(2), Size(4), set(), EVERYTHING),
    (Size(2), Size(1), set(), EVERYTHING),
    (Size(4), Size(2), {"epoch"}, EVERYTHING[:-1]),
    (Size(2), Size(1), {"model", "optimizer"}, ("step_nr", "epoch")),
    (Size(2, 2), Size(1, 2), {"model"}, EVERYTHING[2:]),
    (Size(1, 2), Size(1), {"*"}, EVERYTHING),
    (Size(1, 2), Size(2), {"*"}, EVERYTHING),
    (Size(2, 2), Size(4), {"*"}, EVERYTHING),
    (Size(2), Size(1, 2), set(), EVERYTHING),
]


def told(value: object) -> str:
    """The same in every process, which the text of a set is not."""
    return "+".join(sorted(value)) or "none" if isinstance(value, (set, tuple)) else str(value)


@pytest.mark.parametrize(("before", "after", "replicated", "named"), OTHERS, ids=told)
def test_another_number_of_ranks(
    tmp_path: Path, before: Size, after: Size, replicated: set[str], named: tuple[str, ...]
) -> None:
    """What all held alike loads anywhere. If there is more, nothing is loaded, and all of it is named."""

    def save_it(manager: sc.CheckpointManager, gangs: sc.Gangs) -> dict[str, Any]:
        transact(manager, 1, state_of(gangs, replicated), replicated_keys=replicated)
        return state_of(gangs, replicated)

    def load_it(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        if not named:
            equal(manager.load_checkpoint(1), of_first[gangs.tp.rank])
            return
        for load in (manager.load_last_checkpoint, lambda: manager.load_checkpoint(1)):
            with pytest.raises(sc.CheckpointMismatchError) as caught:
                load()
            assert caught.value.step == 1
            text = "\n".join(caught.value.problems)
            assert {key for key in EVERYTHING if f": {key} was saved" in text} == set(named)

    of_first = on_ranks(before, tmp_path, save_it)[: before.tp]
    on_ranks(after, tmp_path, load_it)


def test_what_is_alike_without_being_declared_loads_on_others(tmp_path: Path) -> None:
    """Values are compared at the save; fairseq2 gave rank 2 of 4 nothing, and no error."""

    def save_it(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        state = state_of(gangs, {"*"})
        transact(manager, 1, {"step_nr": 7, "names": ["a", "b"], "model": state["model"]}, replicated_keys={"model"})

    def load_it(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        expected = {"step_nr": 7, "names": ["a", "b"], "model": state_of(gangs, {"*"})["model"]}
        equal(manager.load_checkpoint(1), expected)

    on_ranks(TWO, tmp_path, save_it)
    for size in (Size(1), Size(4)):
        on_ranks(size, tmp_path, load_it)


def test_metadata_of_another_number_of_shards(tmp_path: Path) -> None:
    on_ranks(Size(1, 2), tmp_path, lambda manager, gangs: save(manager, gangs, 1))

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        with pytest.raises(sc.CheckpointMismatchError, match=r"metadata\.0\.pt, metadata\.1\.pt") as caught:
            manager.load_metadata(1)
        assert caught.value.step == 1

    on_ranks(Size(2), tmp_path, act)
    on_ranks(Size(2, 2), tmp_path, lambda manager, gangs: equal(manager.load_metadata(1)["of"], 1))


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


@pytest.mark.parametrize("trick", ["another archive", "another pickle in it"])
def test_no_file_runs_code(tmp_path: Path, trick: str) -> None:
    """Also not one of which the record gives the right size and every right checksum."""
    on_ranks(Size(1), tmp_path, lambda manager, gangs: transact(manager, 1, {"epoch": 5, "pad": "x" * 4000}))
    path, mark = tmp_path / "step_1" / "rank_0.pt", tmp_path / "it ran"
    if trick == "another archive":
        torch.save({"epoch": Evil(mark)}, path)
    else:
        at, nbytes = _pickle_in(path)
        content = pickle.dumps({"epoch": Evil(mark)}, protocol=2)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(content + bytes(nbytes - len(content)))
    _make_the_record_agree(path, in_place=trick != "another archive")
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        torch.load(path, weights_only=True)

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        with pytest.raises(sc.CheckpointDamagedError, match="mkdir") as caught:
            manager.load_checkpoint(1)
        assert caught.value.step == 1

    on_ranks(Size(1), tmp_path, act)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # it was a live one
    assert mark.exists()


def _pickle_in(path: Path) -> tuple[int, int]:
    """Where in an archive the pickle lies that torch reads, and its length in bytes."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
    header = path.read_bytes()[info.header_offset : info.header_offset + 30]
    lengths = [int.from_bytes(header[at : at + 2], "little") for at in (26, 28)]
    return info.header_offset + 30 + sum(lengths), info.file_size


def _make_the_record_agree(path: Path, *, in_place: bool) -> None:
    """Give the file the sizes and checksums of what now lies in it."""
    at, nbytes = _pickle_in(path)
    content, record = path.read_bytes(), path.parent / "manifest.json"
    manifest = decode_manifest(record.read_bytes())
    (entry,) = (file for file in manifest.files if file.name == path.name)
    assert entry.tree is not None
    assert not in_place or entry.tree[:2] == (at, nbytes)
    new = replace(entry, nbytes=len(content), crc=crc32(content), tree=(at, nbytes, crc32(content[at : at + nbytes])))
    new = new if in_place else replace(new, index=None)
    files = [new if file is entry else file for file in manifest.files]
    record.write_bytes(encode_manifest(replace(manifest, files=tuple(files))))
