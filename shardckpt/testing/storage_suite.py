"""What every storage must do: inherit `StorageContract` (or, from `renaming_suite`, `RenamingContract`).

class TestMine(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path):
        return MyStorage(tmp_path)
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise

import pytest

from shardckpt.storage.base import Buffer, Read, Storage

# Each could lead outside of the root, or means one thing here and another there.
HOSTILE_KEYS = (
    "",
    "/",
    "/etc/passwd",
    "//etc/passwd",
    "../outside",
    "a/../../outside",
    "a/..",
    "./a",
    "a/./b",
    ".",
    "..",
    "a//b",
    "a/",
    "a\\..\\b",
    "a\0b",
    "file:///etc/passwd",
    "s3://bucket/key",
    "C:/windows",
)


def filled(nbytes: int, seed: int = 1) -> bytes:
    """Bytes of which no two pieces look alike, the same every time."""
    return random.Random(seed).randbytes(nbytes)


def ranges(storage: Storage, key: str, *wanted: tuple[int, int]) -> list[bytes]:
    """Several ranges (offset, length) of one key, read in one call."""
    into = [bytearray(nbytes) for _, nbytes in wanted]
    storage.read_into([Read(key, offset, memoryview(buffer)) for (offset, _), buffer in zip(wanted, into, strict=True)])
    return [bytes(buffer) for buffer in into]


class StorageContract:
    """The seam's promises that hold on file systems and object stores alike."""

    @pytest.fixture
    def storage(self) -> Storage:
        """An empty storage; override it. Clean up after a `yield` if there is something to clean up."""
        raise NotImplementedError("override the fixture `storage`")

    def test_what_was_put_is_read(self, storage: Storage) -> None:
        parts: list[Buffer] = [
            b"one",
            bytearray(b"two"),
            memoryview(b"three"),
            b"",
            memoryview(bytearray(b"4444"))[1:3],
        ]
        assert storage.put("step_1/rank_0.pt", parts) == 13
        assert storage.read("step_1/rank_0.pt") == b"onetwothree44"
        assert storage.size("step_1/rank_0.pt") == 13

    def test_parts_may_come_from_an_iterator(self, storage: Storage) -> None:
        assert storage.put("a", (bytes([65 + index]) * 3 for index in range(4))) == 12
        assert storage.read("a") == b"AAABBBCCCDDD"

    def test_an_object_may_be_empty(self, storage: Storage) -> None:
        assert storage.put("none", []) == 0
        assert storage.put("nothing", [b""]) == 0
        assert (storage.size("none"), storage.read("nothing")) == (0, b"")
        assert storage.list() == ["none", "nothing"]

    def test_many_small_parts_and_a_large_one(self, storage: Storage) -> None:
        small, large = [filled(7, seed) for seed in range(3000)], filled((17 << 20) + 5)
        assert storage.put("mixed", [*small, large, b"end"]) == 21000 + len(large) + 3
        head, middle, tail = ranges(
            storage, "mixed", (0, 21000), (21000 + (9 << 20), 4096), (21000 + len(large) - 2, 5)
        )
        assert head == b"".join(small)
        assert middle == large[9 << 20 : (9 << 20) + 4096]
        assert tail == large[-2:] + b"end"

    def test_any_plain_name_will_do(self, storage: Storage) -> None:
        for key in ("run.json", "a b/ö.txt", "a/b/c/d/e.bin", "x*y/[z]?.pt", "~a", "%41#1", "-rf", "h?x=1"):
            storage.put(key, [b"1"])
            storage.put(key + ".other", [b"2"])
            assert (storage.read(key), storage.size(key)) == (b"1", 1)
            assert ranges(storage, key, (0, 1)) == [b"1"]
            assert key.rpartition("/")[2] in storage.list(key.rpartition("/")[0])
            storage.delete([key])
            assert storage.read(key + ".other") == b"2"
            with pytest.raises(FileNotFoundError):
                storage.size(key)

    def test_a_key_cannot_lead_outside(self, storage: Storage) -> None:
        for key in HOSTILE_KEYS:
            calls: list[Callable[[], object]] = [
                partial(storage.put, key, [b""]),
                partial(storage.replace, key, b""),
                partial(storage.read, key),
                partial(storage.read_into, [Read(key, 0, memoryview(bytearray(1)))]),
                partial(storage.size, key),
                partial(storage.delete, [key]),
            ]
            if key not in ("", "a/"):  # as folders they are plain
                calls += [partial(storage.list, key), partial(storage.delete_tree, key)]
            for call in calls:
                with pytest.raises(ValueError, match="not a storage key"):
                    call()

    def test_put_is_write_once(self, storage: Storage) -> None:
        storage.put("a/b", [b"first"])
        with pytest.raises(FileExistsError, match="a/b"):
            storage.put("a/b", [b"second"])
        with pytest.raises(FileExistsError):
            storage.put("a/b", [b"first"])
        assert storage.read("a/b") == b"first"

    def test_one_of_many_racing_writers_wins(self, storage: Storage) -> None:
        start = threading.Barrier(8)

        def write(rank: int) -> bool:
            start.wait(20)
            try:
                storage.put("record", [b"from ", str(rank).encode()])
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert won.count(True) == 1
        assert storage.read("record") == b"from %d" % won.index(True)

    def test_of_two_puts_one_inside_the_other_one_wins(self, storage: Storage) -> None:
        """Whether the key is taken when a put begins or when it ends."""
        won = []

        def put(content: bytes, parts: Iterable[Buffer]) -> None:
            with suppress(FileExistsError):
                storage.put("record", parts)
                won.append(content)

        def outer() -> Iterator[bytes]:
            put(b"inner", [b"inner"])
            yield b"outer"

        put(b"outer", outer())
        assert won in ([b"inner"], [b"outer"])
        assert storage.read("record") == won[0]

    @pytest.mark.parametrize("nbytes", [10, 20 << 20], ids=["small", "large"])
    def test_parts_that_fail_leave_nothing(self, storage: Storage, nbytes: int) -> None:
        """Also not when the error is an `OSError`, which is the caller's and goes through as it is."""
        broken = FileNotFoundError(2, "the caller's own trouble")

        def parts() -> Iterator[bytes]:
            yield filled(nbytes)
            raise broken

        with pytest.raises(FileNotFoundError) as caught:
            storage.put("a/half", parts())
        assert caught.value is broken
        assert storage.list("a") == []
        storage.put("a/half", [b"whole"])
        assert storage.read("a/half") == b"whole"

    def test_replace_creates_and_overwrites(self, storage: Storage) -> None:
        storage.replace("step_1/score.txt", b"0.5")
        storage.replace("step_1/score.txt", b"0.25, and longer")
        assert storage.read("step_1/score.txt") == b"0.25, and longer"
        assert storage.list("step_1") == ["score.txt"]

    def test_ranges_arrive_in_their_places(self, storage: Storage) -> None:
        content = filled(100_000)
        storage.put("a", [content])
        storage.put("b/c", [content[::-1]])
        into = bytearray(60)
        view = memoryview(into)
        storage.read_into(
            [
                Read("a", 99_990, view[0:10]),  # at the very end
                Read("b/c", 0, view[10:20]),
                Read("a", 10, view[20:30]),  # three neighbours, out of order
                Read("a", 0, view[30:40]),
                Read("a", 20, view[40:50]),
                Read("a", 5, view[50:60]),  # overlaps
            ]
        )
        wanted = [content[-10:], content[::-1][:10], content[10:20], content[:10], content[20:30], content[5:15]]
        assert bytes(into) == b"".join(wanted)

    def test_many_neighbours_and_a_long_range(self, storage: Storage) -> None:
        content = filled(18 << 20)
        storage.put("a", [content])
        into = bytearray(len(content))
        view = memoryview(into)
        cuts = [*range(0, 6000, 3), 6000, len(content)]
        storage.read_into([Read("a", start, view[start:end]) for start, end in pairwise(cuts)])
        assert into == content

    def test_reading_nothing_is_no_error(self, storage: Storage) -> None:
        storage.read_into([])
        storage.put("a", [b"abc"])
        assert ranges(storage, "a", (3, 0), (1, 1)) == [b"", b"b"]

    @pytest.mark.parametrize(("offset", "nbytes"), [(0, 11), (9, 2), (10, 1), (1000, 5)])
    def test_an_object_that_ends_too_early_says_so(self, storage: Storage, offset: int, nbytes: int) -> None:
        storage.put("a/short", [b"0123456789"])
        with pytest.raises(EOFError, match="a/short"):
            ranges(storage, "a/short", (0, 5), (offset, nbytes))

    def test_what_is_not_there(self, storage: Storage) -> None:
        storage.put("a/b", [b"1"])
        for key in ("missing", "a/missing", "missing/b", "a", "a/b/c"):
            with pytest.raises(FileNotFoundError, match=key):
                storage.read(key)
            with pytest.raises(FileNotFoundError, match=key):
                storage.size(key)
            with pytest.raises(FileNotFoundError, match=key):
                ranges(storage, key, (0, 1))
            assert storage.list(key) == (["b"] if key == "a" else [])
            storage.delete_tree("missing/at/all")
            if key != "a":
                storage.delete([key])
        assert storage.read("a/b") == b"1"

    def test_list_shows_one_level_sorted(self, storage: Storage) -> None:
        assert storage.list() == []
        for key in ("step_2/a", "step_10/a/b", "step_10/c", "run.json", "step_10.txt", "Z"):
            storage.put(key, [b"1"])
        assert storage.list() == ["Z", "run.json", "step_10.txt", "step_10/", "step_2/"]
        assert storage.list("step_10") == storage.list("step_10/") == ["a/", "c"]
        assert storage.list("step_10/a") == ["b"]
        assert storage.list("step_1") == []

    def test_changes_are_seen_at_once(self, storage: Storage) -> None:
        for round_ in range(3):
            assert storage.list("d") == []
            storage.put("d/x", [b"1" * round_])
            assert (storage.list("d"), storage.size("d/x")) == (["x"], round_)
            storage.delete(["d/x", "d/never"])
            with pytest.raises(FileNotFoundError):
                storage.size("d/x")

    def test_delete_tree_deletes_that_tree_only(self, storage: Storage) -> None:
        for key in ("s/1", "s/t/2", "s/t/u/3", "s.txt", "s2/1", "z/s/1"):
            storage.put(key, [b"1"])
        storage.delete_tree("s/")
        storage.delete_tree("s")
        assert storage.list() == ["s.txt", "s2/", "z/"]
        assert storage.list("s") == []
        assert storage.list("z/s") == ["1"]
        with pytest.raises(ValueError, match="not a storage key"):
            storage.delete_tree("")

    def test_several_threads_at_once(self, storage: Storage) -> None:
        def work(rank: int) -> None:
            content = filled(50_000, rank)
            storage.put(f"step_1/rank_{rank}.pt", [content[:7], content[7:]])
            assert ranges(storage, f"step_1/rank_{rank}.pt", (5, 1000), (49_000, 1000)) == [
                content[5:1005],
                content[49_000:],
            ]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(16)))
        assert len(storage.list("step_1")) == 16

    def test_url_and_repr_are_for_people(self, storage: Storage) -> None:
        assert storage.url
        assert storage.url in repr(storage)

    def test_close_may_be_called_twice(self, storage: Storage) -> None:
        storage.put("a", [b"1"])
        storage.close()
        storage.close()
