"""Which reads make one request, work on several threads, and contents that recognise themselves."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.storage import MemoryStorage, Read
from shardckpt.storage.transfer import several
from shardckpt.storage.transfer.fingerprint import Fingerprint, fingerprint, stores
from shardckpt.storage.transfer.ranges import merge
from shardckpt.storage.transfer.several import bundles, for_each
from shardckpt.storage.transfer.summing import sums_of

SOME_READS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 60), st.integers(0, 20)), max_size=30)


@given(wanted=SOME_READS, run_nbytes=st.integers(1, 40), run_buffers=st.integers(1, 5))
def test_merged_runs_ask_for_the_same_bytes(wanted, run_nbytes: int, run_buffers: int) -> None:
    reads = [Read(key, offset, memoryview(bytearray(nbytes))) for key, offset, nbytes in wanted]
    runs = merge(reads, run_nbytes=run_nbytes, run_buffers=run_buffers)
    for run in runs:
        assert 0 < run.nbytes <= run_nbytes
        assert len(run.into) <= run_buffers
        for position, buffer in enumerate(run.into):
            offset = run.offset + sum(map(len, run.into[:position]))
            buffer[:] = bytes((offset + step + ord(run.key)) % 256 for step in range(len(buffer)))
    for read in reads:
        assert read.into == bytes((read.offset + step + ord(read.key)) % 256 for step in range(len(read.into)))
    assert [run.key for run in runs] == sorted(run.key for run in runs)


@given(wanted=SOME_READS, run_nbytes=st.integers(1, 40), run_buffers=st.integers(1, 5))
def test_the_sum_of_a_read_follows_from_those_of_its_runs(wanted, run_nbytes: int, run_buffers: int) -> None:
    """However the reads were joined, cut and sorted, also several of the same bytes and of none."""
    contents = {key: random.Random(key).randbytes(100) for key in "ab"}
    reads = [Read(key, offset, memoryview(bytearray(nbytes))) for key, offset, nbytes in wanted]
    runs, pieces = merge(reads, run_nbytes=run_nbytes, run_buffers=run_buffers), list[tuple[int, int]]()
    for run in runs:
        run.fill(contents[run.key][run.offset : run.end], url="")
        pieces += [(zlib.crc32(buffer), len(buffer)) for buffer in run.into]
    assert sums_of(reads, pieces) == [zlib.crc32(contents[key][at : at + n]) for key, at, n in wanted]


def test_neighbours_become_one_run_and_gaps_do_not() -> None:
    places = [("a", 10, 5), ("a", 0, 10), ("a", 16, 4), ("b", 20, 1), ("a", 20, 2)]
    reads = [Read(key, offset, memoryview(bytearray(nbytes))) for key, offset, nbytes in places]
    runs = merge(reads, run_nbytes=100, run_buffers=100)
    assert [(run.key, run.offset, run.nbytes, len(run.into)) for run in runs] == [
        ("a", 0, 15, 2),
        ("a", 16, 6, 2),
        ("b", 20, 1, 1),
    ]


def test_destinations_of_any_item_type() -> None:
    storage, into = MemoryStorage(), memoryview(bytearray(8)).cast("i")
    storage.put("a", [memoryview(bytes(range(8))).cast("i")])
    storage.read_into([Read("a", 0, into)])
    assert into.tobytes() == bytes(range(8))
    (run,) = merge([Read("a", 0, into)], run_nbytes=100, run_buffers=10)
    assert run.nbytes == 8


class TestForEach:
    def test_every_item_once_and_no_thread_left(self) -> None:
        before, seen, lock = threading.active_count(), [], threading.Lock()

        def work(item: int) -> None:
            with lock:
                seen.append(item)

        for_each(range(500), work, threads=4)
        assert sorted(seen) == list(range(500))
        assert threading.active_count() == before

    def test_items_are_pulled_in_the_callers_thread_not_far_ahead(self) -> None:
        done: list[int] = []
        ahead: list[int] = []
        lock, caller = threading.Lock(), threading.get_ident()

        def items():
            for item in range(100):
                assert threading.get_ident() == caller
                with lock:
                    ahead.append(item - len(done))
                yield item

        def work(item: int) -> None:
            with lock:
                done.append(item)

        for_each(items(), work, threads=3)
        assert max(ahead) <= 2 * 3 + 3

    def test_it_is_several_at_once(self) -> None:
        meeting = threading.Barrier(3)

        def work(_: int) -> None:
            meeting.wait(20)

        for_each(range(6), work, threads=3)

    @pytest.mark.parametrize("threads", [1, 3])
    def test_the_first_failure_ends_it(self, threads: int) -> None:
        begun, pulled = [], []

        def items():
            for item in range(1000):
                pulled.append(item)
                yield item

        def work(item: int) -> None:
            begun.append(item)
            if item == 5:
                raise ZeroDivisionError(item)

        with pytest.raises(ZeroDivisionError, match="5"):
            for_each(items(), work, threads=threads)
        assert len(pulled) < 50
        assert len(begun) < 50

    def test_a_failing_iterator_waits_for_what_is_under_way(self) -> None:
        begun, release, under_way, ended = threading.Event(), threading.Event(), set(), []

        def items():
            yield 1
            yield 2
            assert begun.wait(20)
            release.set()
            raise ZeroDivisionError

        def work(item: int) -> None:
            under_way.add(item)
            begun.set()
            assert release.wait(20)
            under_way.remove(item)
            ended.append(item)

        with pytest.raises(ZeroDivisionError):
            for_each(items(), work, threads=2)
        assert not under_way
        assert ended

    def test_what_waits_is_dropped_when_the_iterator_fails(self) -> None:
        begun: list[int] = []
        both, release = threading.Barrier(3), threading.Event()

        def items():
            yield from range(4)  # two are being worked on, two wait
            both.wait(20)
            timer.start()
            raise ZeroDivisionError

        def work(item: int) -> None:
            begun.append(item)
            both.wait(20)
            assert release.wait(20)

        timer = threading.Thread(target=lambda: dropped.wait(20) and release.set())
        dropped = threading.Event()
        real = several._Crew.drop_waiting

        class Crew(several._Crew):
            def drop_waiting(self) -> None:
                real(self)
                dropped.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(several, "_Crew", Crew)
            with pytest.raises(ZeroDivisionError):
                for_each(items(), work, threads=2)
        timer.join(20)
        assert sorted(begun) == [0, 1]

    @pytest.mark.parametrize("allowed", [0, 1])
    def test_where_no_thread_can_be_started_fewer_do(self, allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[threading.Thread] = []
        real = threading.Thread.start

        def start(thread: threading.Thread) -> None:
            if len(started) >= allowed:
                raise RuntimeError("can't start new thread")
            started.append(thread)
            real(thread)

        monkeypatch.setattr(threading.Thread, "start", start)
        seen: list[int] = []
        for_each(range(50), seen.append, threads=3)
        assert seen == list(range(50))

    def test_it_works_while_the_interpreter_shuts_down(self) -> None:
        """The save thread may still be writing when the main thread has ended."""
        program = """
import threading
from shardckpt.storage.transfer.several import bundles, for_each

def save():
    threading.main_thread().join()
    done = []
    for_each(range(100), done.append, threads=3)
    print(sorted(done) == list(range(100)))

threading.Thread(target=save).start()
"""
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
        assert run.stdout.strip() == "True"


class TestFingerprint:
    def test_a_content_recognises_itself(self) -> None:
        storage = MemoryStorage()
        storage.put("a", [b"one", b"two"])
        assert stores(storage, "a", fingerprint([b"onetwo"]))
        assert not stores(storage, "a", fingerprint([b"onetwO"]))
        assert not stores(storage, "a", fingerprint([b"onetwo!"]))
        assert not stores(storage, "missing", fingerprint([b""]))

    def test_it_does_not_depend_on_the_cuts(self) -> None:
        content = bytes(range(256)) * 100_000  # more than the window of the reading back
        assert fingerprint([content]) == fingerprint([content[:1], content[1:77], content[77:]])
        storage = MemoryStorage()
        storage.put("a", [content])
        assert stores(storage, "a", Fingerprint().extended(content))


@given(st.lists(st.integers(0, 12)), st.integers(1, 20))
def test_bundles_keep_the_order_and_are_as_large_as_they_may_be(sizes: list[int], most: int) -> None:
    found = list(bundles(sizes, int, most=most))
    assert [size for bundle in found for size in bundle] == sizes
    assert all(len(bundle) == 1 or sum(bundle) <= most for bundle in found)
    assert all(sum(one) + other[0] > most for one, other in pairwise(found))
