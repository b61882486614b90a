"""The check itself, in the process of the test: has the training that was resumed gone on as the one that was not?"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from shardckpt.engine.loading.selecting.policy import LoadPolicy
from shardckpt.testing.pool import ProcessPool
from shardckpt.testing.resumable.marks import alike, first_difference
from shardckpt.testing.resumable.training import Make, Seen, Shape, load_and_train, train_and_save

_STEPS = (2, 2)


def assert_resumable(
    make: Make,
    *,
    before: Shape = (1,),
    after: Sequence[Shape] = (),
    steps: tuple[int, int] = _STEPS,
    tolerance: float = 1e-5,
    policy: LoadPolicy | None = None,
    pool: ProcessPool | None = None,
    timeout_s: float = 100.0,
) -> None:
    """Train, save and go on; resume in processes that have been made anew; `AssertionError` if that is not the same.

        def test_my_training():
            assert_resumable(make_training, before=(2,), after=[(2,), (1,)])

    Called in a test, on one thread. On the mesh of `before` every loss and every tensor and value of the state must be
    the same bit for bit after each step, on every rank. On another mesh all that ranks held alike must be the same when
    it has been loaded, and the mean of the ranks' losses within `tolerance` afterwards, since sums are done in another
    order there. The error names the step and the first key that differ. A state that cannot be saved or loaded is the
    error of shardckpt that says so, as it came up on the ranks (`RanksFailedError`).

    Args:
        make: a function of a module, by name. Called with the shape of the mesh on each of its ranks, in a gloo group
            of them; makes the `Training` from nothing. All random streams have other values each time.
        before: the mesh that trains and saves: (2, 2) is four ranks.
        after: the meshes that resume; if none is given, that of `before`.
        steps: how many are done before the save, and after it.
        tolerance: relative, of losses on other meshes.
        policy: for the load; says what becomes of values that differ between ranks (`new_world`).
        pool: the processes; the check starts its own if none are given, which takes some seconds.
        timeout_s: for each job, in seconds.
    """
    with (
        tempfile.TemporaryDirectory(prefix="shardckpt-resumable-") as folder,
        nullcontext(pool) if pool is not None else ProcessPool() as processes,
    ):
        root = Path(folder)
        expected = processes.run(math.prod(before), train_and_save, make, before, root, steps, timeout=timeout_s)
        for shape in after or [before]:
            args = (make, shape, root, steps, policy)
            found = processes.run(math.prod(shape), load_and_train, *args, timeout=timeout_s)
            problem = next(_differences(expected, found, None if shape == before else tolerance), None)
            if problem is not None:
                raise AssertionError(f"saved on {before}, resumed on {shape}: {problem}")


def _differences(expected: list[list[Seen]], found: list[list[Seen]], tolerance: float | None) -> Iterator[str]:
    """What differs, from the first step on; no tolerance: bit for bit."""
    for one, other in zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True):
        yield from _exactly(one, other) if tolerance is None else _about(one, other, tolerance)


def _exactly(expected: Sequence[Seen], found: Sequence[Seen]) -> Iterator[str]:
    for rank, (one, other) in enumerate(zip(expected, found, strict=True)):
        key = first_difference(one.marks, other.marks)
        losses = "" if repr(one.loss) == repr(other.loss) else f", and the loss: {other.loss!r}, not {one.loss!r}"
        if key is not None:
            yield f"{_when(one)}, rank {rank}: {key} differs{losses}"
        elif losses:
            yield f"{_when(one)}, rank {rank}: all of the state is the same, but not the loss: {other.loss!r}, not " + (
                f"{one.loss!r}; something that it depends on is not in the state"
            )


def _about(expected: Sequence[Seen], found: Sequence[Seen], tolerance: float) -> Iterator[str]:
    first = expected[0]
    if first.loss is None:
        before, now = alike([seen.marks for seen in expected]), alike([seen.marks for seen in found])
        both = {key: digest for key, digest in before.items() if key in now}
        key = first_difference(both, {key: now[key] for key in both})
        if key is not None:
            yield f"{_when(first)}: {key} differs"
        missing = next((key for key in before if not any(key in seen.marks for seen in found)), None)
        if missing is not None:
            yield f"{_when(first)}: {missing} is on no rank any more"
        return
    one, other = _mean(expected), _mean(found)
    if not (math.isclose(one, other, rel_tol=tolerance) or (math.isnan(one) and math.isnan(other))):
        yield f"{_when(first)}: the mean of the losses is {other!r}, not {one!r}"


def _mean(seen: Sequence[Seen]) -> float:
    return math.fsum(one.loss for one in seen if one.loss is not None) / len(seen)


def _when(seen: Seen) -> str:
    return f"after the load of step {seen.step}" if seen.loss is None else f"after step {seen.step}"
