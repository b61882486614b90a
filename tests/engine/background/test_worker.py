"""Jobs are done in order, whatever becomes of the thread; none is lost, none is done twice."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import Future

import pytest

from shardckpt.engine.background import worker as module
from shardckpt.engine.background.worker import Worker, WorkerLostError

LIMIT_S = 20.0


def kill(thread: threading.Thread) -> None:
    """As nothing but a debugger does: an exception out of nowhere, at the thread's next instruction."""
    assert thread.ident is not None
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1


def thread_of(worker: Worker) -> threading.Thread:
    threads: list[threading.Thread] = []
    worker.submit(lambda: threads.append(threading.current_thread())).result(LIMIT_S)
    return threads[0]


def test_jobs_are_done_in_order_by_one_thread() -> None:
    worker, done = Worker("in-order"), []
    futures = [worker.submit(lambda n=n: done.append((n, threading.current_thread()))) for n in range(20)]  # type: ignore[misc]
    for future in futures:
        future.result(LIMIT_S)
    worker.close()
    assert [number for number, _ in done] == list(range(20))
    assert len({thread for _, thread in done}) == 1
    assert not done[0][1].is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(lambda: None)


def test_the_error_of_a_job_is_its_own() -> None:
    worker = Worker("errors")
    for error in (ValueError("no"), KeyboardInterrupt(), SystemExit(3)):

        def fail(error: BaseException = error) -> None:
            raise error

        assert worker.submit(fail).exception(LIMIT_S) is error
    worker.submit(lambda: None).result(LIMIT_S)
    worker.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_is_killed_while_it_waits_loses_nothing() -> None:
    worker = Worker("idle")
    first = thread_of(worker)
    for _ in range(5):
        before = thread_of(worker)
        kill(before)
        assert thread_of(worker).is_alive()
    worker.close()
    first.join(LIMIT_S)
    assert not first.is_alive()


def test_a_thread_that_is_killed_in_a_job_loses_that_one_alone() -> None:
    worker, begun, done = Worker("at-work"), threading.Event(), list[int]()

    def work() -> None:
        begun.set()
        while True:
            threading.Event().wait(0.001)

    victim: Future[None] = worker.submit(work)
    others = [worker.submit(lambda n=n: done.append(n)) for n in range(3)]  # type: ignore[misc]
    assert begun.wait(LIMIT_S)
    (thread,) = [each for each in threading.enumerate() if each.name == "at-work"]
    kill(thread)
    assert isinstance(victim.exception(LIMIT_S), SystemExit)
    for other in others:
        other.result(LIMIT_S)
    assert done == [0, 1, 2]
    worker.close()


def test_a_thread_that_hangs_is_given_up() -> None:
    worker, gate, begun, done = Worker("hung"), threading.Event(), threading.Event(), list[str]()
    hung = worker.submit(lambda: begun.set() or gate.wait(LIMIT_S))  # type: ignore[func-returns-value]
    follower = worker.submit(lambda: done.append("follower"))
    assert begun.wait(LIMIT_S)
    worker.give_up(hung)
    assert isinstance(hung.exception(LIMIT_S), WorkerLostError)
    follower.result(LIMIT_S)
    assert done == ["follower"]
    gate.set()  # it wakes up, and finds that its place is taken
    assert thread_of(worker).name == "hung"
    worker.close()


def test_a_thread_with_nothing_to_do_ends_and_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINGER_S", 0.01)
    worker = Worker("short")
    thread = thread_of(worker)
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert thread_of(worker) is not thread
    worker.close()
