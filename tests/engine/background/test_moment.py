"""What is committed is what was there at the moment of `save`, bit for bit, whatever the loop does as soon as it may.

The copy of parameters and optimizer state is put off for as long as the promise allows: it begins when something waits
for it. So whatever changes them without waiting is found in the checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import shardckpt as sc
from shardckpt.engine.pending import PendingSave
from shardckpt.engine.saving.stage import Staging
from shardckpt.storage.memory import MemoryStorage

LIMIT = timedelta(seconds=30)


class Own(torch.optim.Optimizer):
    """As people write them: in place, with state made on the way, and a step of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 0.3)
                    parameter.data.sub_(mean, alpha=group["lr"])


MAKE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False),
    "foreach": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "own": Own,
}


class Loop:
    """A training loop in which everything may be called at any time."""

    def __init__(self, kind: str, checkpoints: sc.CheckpointManager, *, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.checkpoints = checkpoints
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 8))
        self.model: Any = torch.compile(self.net, backend="eager") if compiled else self.net
        self.optimizer = MAKE[kind](self.model.parameters())
        self.optimizer_step = torch.compile(self.optimizer.step, backend="eager") if compiled else self.optimizer.step
        self.ema = {name: value.detach().clone() for name, value in self.net.named_parameters()}
        self.values = {"seen": [0]}
        self.state = {"model": self.model, "optimizer": self.optimizer, "ema": self.ema, "values": self.values}
        self.saved: dict[int, Any] = {}
        self.step()  # there is something in the optimizer

    def accumulate(self) -> None:
        self.model(torch.randn(4, 8)).square().mean().backward()  # and the running means change

    def step(self) -> None:
        self.accumulate()
        self.optimizer_step()
        self.values["seen"].append(len(self.values["seen"]))

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def change_buffers(self) -> None:
        for buffer in self.net.buffers():
            buffer.add_(1)

    def average(self) -> None:
        """Into tensors of the state that no optimizer has."""
        for name, value in self.net.named_parameters():
            self.ema[name].lerp_(value.detach(), 0.5)

    def put_average_into_parameters(self) -> None:
        with self.checkpoints.guard():
            for name, value in self.net.named_parameters():
                value.data.copy_(self.ema[name])

    def swap_data(self) -> None:
        """Other memory for a parameter; the old one is left as it is."""
        for value in self.net.parameters():
            value.data = value.data * 2 + 1

    def save(self) -> None:
        step = len(self.saved) + 1
        self.saved[step] = self.snapshot()
        self.checkpoints.save(step, self.state)

    def snapshot(self) -> Any:
        moments = self.optimizer.state_dict()["state"]
        return [
            {name: value.clone() for name, value in self.net.state_dict().items()},
            {(number, key): value.clone() for number, values in moments.items() for key, value in values.items()},
            {name: value.clone() for name, value in self.ema.items()},
            list(self.values["seen"]),
        ]


MUTATIONS = [name for name in vars(Loop) if not name.startswith("_") and name not in ("save", "snapshot")]


@pytest.fixture(autouse=True)
def as_late_as_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of what an optimizer changes begins when somebody waits for it."""
    awaited = threading.Event()
    copy, until_staged, wait = Staging.copy, PendingSave.wait_until_staged, PendingSave.wait

    def late(staging: Staging, wanted: Any) -> None:
        if threading.current_thread().name == "shardckpt-copy":
            assert awaited.wait(30)
            awaited.clear()
        copy(staging, wanted)

    def waiting(wait: Callable[..., Any]) -> Callable[..., Any]:
        def act(pending: PendingSave, *args: Any) -> Any:
            if not pending.staged(timedelta(0)):
                awaited.set()
            return wait(pending, *args)

        return act

    monkeypatch.setattr(Staging, "copy", late)
    monkeypatch.setattr(PendingSave, "wait_until_staged", waiting(until_staged))
    monkeypatch.setattr(PendingSave, "wait", waiting(wait))


def run(kind: str, acts: list[str], *, compiled: bool = False, **saving: Any) -> None:
    policy = sc.SavePolicy(**saving)
    with sc.CheckpointManager(MemoryStorage(), sc.Gangs.local(), saving=policy, timeout=LIMIT) as checkpoints:
        loop = Loop(kind, checkpoints, compiled=compiled)
        for act in acts:
            getattr(loop, act)()
        checkpoints.wait()
        for step, expected in loop.saved.items():
            checkpoints.load(step, loop.state)
            for part, (found, wanted) in enumerate(zip(loop.snapshot()[:3], expected[:3], strict=True)):
                assert found.keys() == wanted.keys()
                for name, value in wanted.items():
                    assert found[name].dtype == value.dtype
                    assert torch.equal(found[name], value), f"part {part}: {name} of step {step} after {acts}"
            assert loop.values["seen"] == expected[3]
            if compiled:  # the plain one has the same names
                checkpoints.load(step, loop.state | {"model": loop.net})


acts = st.lists(st.sampled_from([*MUTATIONS, "save", "save"]), min_size=1, max_size=8).map(lambda them: ["save", *them])


@pytest.mark.parametrize("kind", MAKE)
@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(acts=["save", *MUTATIONS], in_flight=1)
@example(acts=["save", *reversed(MUTATIONS), "save", *MUTATIONS], in_flight=2)
@given(acts=acts, in_flight=st.sampled_from([1, 2]))
def test_whatever_the_loop_does(kind: str, acts: list[str], in_flight: int) -> None:
    run(kind, acts, in_flight=in_flight)


@pytest.mark.parametrize("staging", ["blocking", "none"])
def test_nothing_is_left_to_be_copied_where_all_is_copied_at_once(staging: str) -> None:
    """Here even what needs a guard needs none."""

    def without_guard(loop: Loop) -> None:
        for value in loop.net.parameters():
            value.data.add_(1)

    Loop.without_guard = without_guard  # type: ignore[attr-defined]
    try:
        run("foreach", ["save", "without_guard", *MUTATIONS, "save", "without_guard"], staging=staging)
    finally:
        del Loop.without_guard  # type: ignore[attr-defined]


def test_a_compiled_model_and_a_compiled_step() -> None:
    """The hook is installed at the first save, long after the step was compiled."""
    every = ["step", "step", "save", *MUTATIONS, "save", *reversed(MUTATIONS), "save", "step"]
    run("foreach", every, compiled=True)


def test_this_test_would_find_a_change_that_does_not_wait() -> None:
    def without_guard(loop: Loop) -> None:
        loop.net[2].bias.data.add_(1)

    Loop.without_guard = without_guard  # type: ignore[attr-defined]
    try:
        with pytest.raises(AssertionError, match=r"2\.bias of step 1"):
            run("sgd", ["save", "without_guard"])
        with pytest.raises(sc.CheckpointSaveError, match=r"changed .*: model\.2\.bias\. "):
            run("sgd", ["save", "without_guard"], verify_copies=True)
    finally:
        del Loop.without_guard  # type: ignore[attr-defined]
