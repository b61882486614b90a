"""One fails, all know: work that every rank does, and that succeeds on all ranks or fails on all."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Generic, TypeVar

from shardckpt.errors import Failure, GangError
from shardckpt.gang.base import Fold, Gang, GatherError, Json
from shardckpt.gang.wire.messages import decode, encode, ranks_text
from shardckpt.gang.wire.vain import Deadline

_T = TypeVar("_T")

_FAREWELL = timedelta(seconds=2)
"""How long a rank that is late or interrupted takes to tell the others, and to hear what became of them."""
_LISTED = 8
"""How many failures the text of an error lists; `GangError.failures` has them all."""
_MESSAGE_CHARS, _TRACE_CHARS = 2000, 8000


def together(gang: Gang, work: Callable[[], _T], *, phase: str, timeout: timedelta, step: int | None = None) -> _T:
    """Do `work` on this rank, and return its result when it succeeded on all ranks.

    Called by all ranks of the gang, in a scope that they have entered, in the thread that uses the gang. If it failed
    on any, or if any did not come within `timeout` (work and exchange, as rank 0 sees it), every rank raises the same
    `GangError`: `failures` by rank, `absent`; the rank's own error is its `__cause__`. An interrupt (KeyboardInterrupt,
    SystemExit) on one rank is told to the others and then goes on there. `phase` and `step` are for the message.
    """
    attempt = _Attempt(gang, phase, timeout, step, fold=lambda values: None)
    done = _do(work)
    attempt.settle(done, None)
    return done.result


def together_gather(
    gang: Gang,
    work: Callable[[], Json],
    *,
    phase: str,
    timeout: timedelta,
    step: int | None = None,
    fold: Fold | None = None,
) -> list[Json] | None:
    """As `together`; rank 0 also gets what each rank's `work` returned, in rank order. The others get None.

    With `fold`, which all give, results of ranks that follow each other may have been made one by it: see
    `Gang.gather`.
    """
    attempt = _Attempt(gang, phase, timeout, step, fold=fold)

    def as_message() -> Any:
        return decode(encode(work()))  # what is not JSON is this rank's failure, and not a message that never comes

    done = _do(as_message)
    return attempt.settle(done, done.result if done.error is None else None)


class _Done(Generic[_T]):
    """How the work ended on this rank: with a result or with an error."""

    result: _T
    error: BaseException | None = None

    @property
    def interrupted(self) -> bool:
        return self.error is not None and not isinstance(self.error, Exception)


def _do(work: Callable[[], _T]) -> _Done[_T]:
    done: _Done[_T] = _Done()
    try:
        done.result = work()
    except BaseException as error:
        done.error = error
    return done


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What rank 0 found out; the same error is made of it on every rank."""

    failures: tuple[Failure, ...]
    absent: tuple[int, ...]
    text: str

    def to_json(self) -> Json:
        return [[_failure_to_json(failure) for failure in self.failures], self.absent, self.text]

    @classmethod
    def from_json(cls, value: Any) -> _Verdict:
        return cls(tuple(Failure(*failure) for failure in value[0]), tuple(value[1]), value[2])


class _Attempt:
    """One call of `together` on one rank."""

    def __init__(self, gang: Gang, phase: str, timeout: timedelta, step: int | None, *, fold: Fold | None) -> None:
        self._gang = gang
        self._fold = None if fold is None else partial(_folded, fold)
        self._phase = phase
        self._timeout = timeout
        self._step = step
        self._began = time.monotonic()
        self._deadline = Deadline(timeout)

    def settle(self, done: _Done[Any], value: Json) -> list[Json] | None:
        """Tell how it went here and learn how it went elsewhere; raises unless all is well everywhere."""
        if self._gang.rank == 0:
            values, verdict = self._conclude(done, value)
        else:
            values, verdict = None, self._report(done, value)
        if done.interrupted:
            assert done.error is not None
            raise done.error
        if verdict is not None:
            failures = {failure.rank: failure for failure in verdict.failures}
            raise GangError(verdict.text, failures=failures, absent=verdict.absent, step=self._step) from done.error
        return values

    def _conclude(self, done: _Done[Any], value: Json) -> tuple[list[Json] | None, _Verdict | None]:
        """On rank 0: hear all, decide, tell all."""
        own = self._failure(done) or self._overrun()
        said: Mapping[int, Any] = {0: [own, value]}
        absent: tuple[int, ...] = ()
        trouble = ""
        try:
            gathered: Any = self._gang.gather([own, value], timeout=self._left(done), fold=self._fold)
            said = dict(enumerate(gathered))
            said[0] = [own or self._waited_too_long(), value]
        except GatherError as error:
            said, absent = error.values, error.absent
        except GangError as error:
            trouble = str(error)
        except BaseException as error:  # Ctrl-C while waiting for the others
            self._tell(self._verdict([Failure(0, type(error).__name__, str(error))], (), ""), _FAREWELL)
            raise
        if done.interrupted:
            absent = ()  # they were not given the time
        failures = [Failure(*failure) for rank in sorted(said) for failure in said[rank][0]]
        verdict = self._verdict(failures, absent, trouble) if failures or absent or trouble else None
        self._tell(verdict, max(self._left(done), _FAREWELL))
        return [said[rank][1] for rank in sorted(said)], verdict

    def _tell(self, verdict: _Verdict | None, timeout: timedelta) -> None:
        message = None if verdict is None else verdict.to_json()
        try:
            self._gang.broadcast(message, timeout=timeout)
        except GangError:
            if verdict is None:
                raise

    def _report(self, done: _Done[Any], value: Json) -> _Verdict | None:
        """On the others: tell rank 0, hear its verdict. An interrupted rank listens, too, but not for long."""
        try:
            self._gang.gather([self._failure(done), value], timeout=self._left(done), fold=self._fold)
            verdict = self._gang.broadcast(None, timeout=self._left(done))
        except GangError as error:
            if done.interrupted:
                return None
            text = f"{self._subject()}: {error}"
            raise GangError(text, absent=error.absent, step=self._step) from (done.error or error)
        return None if verdict is None else _Verdict.from_json(verdict)

    def _left(self, done: _Done[Any]) -> timedelta:
        """What is left of the timeout; enough to say and hear the last word, even if there is nothing left."""
        if done.interrupted:
            return _FAREWELL
        elapsed = timedelta(seconds=time.monotonic() - self._began)
        least = timedelta(0) if self._gang.rank == 0 else min(_FAREWELL, self._timeout)
        return max(self._timeout - elapsed, least)

    def _failure(self, done: _Done[Any]) -> list[Json]:
        if done.error is None:
            return []
        trace = "".join(traceback.format_exception(type(done.error), done.error, done.error.__traceback__))
        message = str(done.error)[:_MESSAGE_CHARS]
        return [_failure_to_json(Failure(self._gang.rank, type(done.error).__name__, message, trace[-_TRACE_CHARS:]))]

    def _overrun(self) -> list[Json]:
        """Rank 0's own work took too long: the others have given up or are about to, so it must not succeed here."""
        elapsed = time.monotonic() - self._began
        if elapsed <= self._timeout.total_seconds():
            return []
        message = f"its work took {elapsed:.3g} s, more than the {self._timeout.total_seconds():.3g} s allowed"
        return [_failure_to_json(Failure(0, "TimeoutError", message))]

    def _waited_too_long(self) -> list[Json]:
        """Rank 0 has heard all, but stood still meanwhile (stopped by a signal, on a machine that hung): what they said
        was in its place long ago, and by now they have given up. To go on, and commit, alone would be wrong."""
        if self._deadline.left_s(1):
            return []
        message = f"it came to hear the others only after {self._deadline.waited_s:.3g} s, when they had given up"
        return [_failure_to_json(Failure(0, "TimeoutError", message))]

    def _verdict(self, failures: list[Failure], absent: tuple[int, ...], trouble: str) -> _Verdict:
        return _Verdict(tuple(_trimmed(failures)), absent, self._text(failures, absent, trouble))

    def _subject(self) -> str:
        return f"{self._phase} failed" if self._step is None else f"{self._phase} of step {self._step} failed"

    def _text(self, failures: list[Failure], absent: tuple[int, ...], trouble: str) -> str:
        told = [str(failure) for failure in failures[:_LISTED]]
        if len(failures) > _LISTED:
            told.append(f"and {len(failures) - _LISTED} more ranks")
        if absent:
            waited_s = time.monotonic() - self._began
            told.append(f"{ranks_text(absent)} did not answer (rank 0 waited {waited_s:.3g} s)")
        if trouble:
            told.append(trouble)
        text = f"{self._subject()} on gang {self._gang.name!r} of {self._gang.size}: {'; '.join(told)}"
        traced = next((failure for failure in failures if failure.trace), None)
        if traced is not None:
            text += f"\n\nOn rank {traced.rank}:\n{traced.trace.rstrip()}"
        return text


def _folded(fold: Fold, messages: Sequence[Any]) -> Json:
    """Failures of all; what those give who have not failed is made one."""
    failures = [failure for failed, _ in messages for failure in failed]
    values = [value for failed, value in messages if not failed]
    return [[*failures[:_LISTED], *(_untraced(failure) for failure in failures[_LISTED:])], fold(values)]


def _untraced(failure: Sequence[Any]) -> Json:
    return [*failure[:3], ""]


def _failure_to_json(failure: Failure) -> Json:
    return [failure.rank, failure.kind, failure.message, failure.trace]


def _trimmed(failures: list[Failure]) -> list[Failure]:
    """The traces of the first few only: of four thousand equal ones nobody reads more, and all would travel to all."""
    return [failure if i < _LISTED else replace(failure, trace="") for i, failure in enumerate(failures)]
