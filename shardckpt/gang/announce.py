"""What rank 0 does for all: the others get its result, or its error."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from shardckpt.errors import Failure, GangError
from shardckpt.gang.base import Gang, Json

_log = logging.getLogger(__name__)


def announce(gang: Gang, work: Callable[[], Json], *, phase: str, timeout: timedelta, step: int | None = None) -> Any:
    """Rank 0 does `work`; every rank returns its result, or raises the same `GangError` with rank 0's failure.

    Called by all ranks, in a scope that they have entered. One message down and none up: rank 0 does not learn who
    heard it. A rank that hears nothing within `timeout` raises a `GangError` without failures: what rank 0 did is then
    unknown to it. On rank 0 the error of `work` is the `__cause__`; what rank 0 has done stands, even if it could not
    be told.
    """
    if gang.rank != 0:
        failure, result = _heard(gang.broadcast(None, timeout=timeout))
    else:
        failure, result, cause = None, None, None
        try:
            result = work()
        except BaseException as error:
            failure, cause = _failure(error), error
        _tell(gang, [_encoded(failure), result], timeout)
        if cause is not None:
            if not isinstance(cause, Exception):
                raise cause
            raise _error(gang, failure, phase, step) from cause
    if failure is not None:
        raise _error(gang, failure, phase, step)
    return result


def _tell(gang: Gang, message: Json, timeout: timedelta) -> None:
    try:
        gang.broadcast(message, timeout=timeout)
    except GangError as error:
        _log.warning("not every rank could be told: %s", error)


def _heard(message: Any) -> tuple[Failure | None, Json]:
    failure, result = message
    return None if failure is None else Failure(*failure), result


def _encoded(failure: Failure | None) -> Json:
    return None if failure is None else [failure.rank, failure.kind, failure.message, failure.trace]


def _failure(error: BaseException) -> Failure:
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Failure(0, type(error).__name__, str(error), trace[-8000:])


def _error(gang: Gang, failure: Failure | None, phase: str, step: int | None) -> GangError:
    assert failure is not None
    what = phase if step is None else f"{phase} of step {step}"
    text = f"{what} failed on gang {gang.name!r} of {gang.size}: {failure}\n\nOn rank 0:\n{failure.trace.rstrip()}"
    return GangError(text, failures={0: failure}, step=step)
