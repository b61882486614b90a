"""Hand-written tensor parallelism: plain tensors that are parts of whole ones; experts; on other numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt as sc
from tests.manager.transactions import Size, equal, files_in, on_ranks, same

HEADS, WIDTH, WORDS = 8, 4, 11
"""11 words are on no two ranks as many."""
QUERY, KEY = 8, 4
RULES: dict[str, Any] = {
    "words.weight": sc.Split(0, sizes=(WORDS,)),
    "qkv.*": sc.Split(0, sections=(QUERY, KEY, KEY)),
    "up.*": 0,
    "down.weight": -1,
}


def whole_of(seed: int) -> dict[str, torch.Tensor]:
    """The parameters of the model as a whole, and a buffer that all ranks have."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "words.weight": some(WORDS, WIDTH),
        "qkv.weight": some(QUERY + 2 * KEY, WIDTH),
        "qkv.bias": some(QUERY + 2 * KEY),
        "up.weight": some(HEADS, WIDTH),
        "up.bias": some(HEADS),
        "down.weight": some(WIDTH, HEADS),
        "down.bias": some(WIDTH),
        "norm": some(WIDTH),
    }


def word_sizes(tp: int) -> tuple[int, ...]:
    return tuple(WORDS // tp + (rank < WORDS % tp) for rank in range(tp))


def part_of(name: str, whole: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    if name == "words.weight":
        return whole.split(word_sizes(tp))[rank]
    if name.startswith("qkv"):
        return torch.cat([section.chunk(tp)[rank] for section in whole.split((QUERY, KEY, KEY))])
    if name.startswith("up"):
        return whole.chunk(tp)[rank]
    return whole.chunk(tp, 1)[rank] if name == "down.weight" else whole


class Part(nn.Module):
    """What one rank has of the model."""

    def __init__(self, seed: int, rank: int, tp: int) -> None:
        super().__init__()
        for name, whole in whole_of(seed).items():
            module, _, own = name.rpartition(".")
            holder = self.get_submodule(module) if module in self._modules else nn.Module()
            if module:
                self.add_module(module, holder)
            target = holder if module else self
            part = part_of(name, whole, rank, tp).clone()
            if module:
                target.register_parameter(own, nn.Parameter(part))
            else:
                target.register_buffer(own, part)


def job(gangs: sc.Gangs, seed: int) -> tuple[Part, torch.optim.Optimizer, dict[str, Any]]:
    """A part, and AdamW with the same part of its moments."""
    rank, tp = gangs.tp.rank, gangs.tp.size
    model = Part(seed, rank, tp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125 * (seed + 1))
    moments = {key: whole_of(seed + 100 * number) for number, key in enumerate(("exp_avg", "exp_avg_sq"), 1)}
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {"step": torch.tensor(3.0 + seed)}
        optimizer.state[parameter] |= {key: part_of(name, m[name], rank, tp).clone() for key, m in moments.items()}
    rules = RULES | {"words.weight": sc.Split(0, sizes=word_sizes(tp))}
    return model, optimizer, {"model": sc.TensorSplit(model, rules), "optimizer": optimizer}


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found |= {f"{name} {key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return found


def expected(gangs: sc.Gangs) -> dict[str, torch.Tensor]:
    model, optimizer, _ = job(gangs, 0)
    return contents(model, optimizer)


def save(root: Path, size: Size) -> None:
    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        _, _, state = job(gangs, 0)
        manager.save(1, state).result()
        manager.save(2, state).result()  # by the plan of the first

    on_ranks(size, root, act)


@pytest.mark.parametrize("before", [Size(1, 2), Size(2, 2), Size(1, 4), Size(1)], ids=str)
def test_parts_load_on_any_number_of_ranks(tmp_path: Path, before: Size) -> None:
    save(tmp_path, before)

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        for step in (1, 2):
            model, optimizer, state = job(gangs, 1)
            manager.load(step, state, policy=sc.LoadPolicy(in_place=step == 2))
            equal(contents(model, optimizer), expected(gangs))
            assert optimizer.param_groups[0]["lr"] == 0.125

    for after in (Size(1, 2), Size(2, 2), Size(1, 4), Size(1), Size(3)):
        on_ranks(after, tmp_path, act)


def test_each_part_is_written_once_and_shared_out(tmp_path: Path) -> None:
    """Of two data-parallel ranks each writes about half; what nobody speaks of is written once for each shard."""
    save(tmp_path, Size(2, 2))
    step = tmp_path / "step_1"
    assert files_in(step) == {
        *(f"rank_{r}.pt" for r in range(4)),
        "replicated.0.pt",
        "replicated.1.pt",
        "manifest.json",
    }
    held = [torch.load(step / f"rank_{rank}.pt", weights_only=True) for rank in range(4)]
    names = [set(content.get("model", {})) for content in held]
    assert names[0] == names[1]
    assert names[2] == names[3]
    assert not names[0] & names[2]
    assert names[0] | names[2] == {"words.weight", "qkv.weight", "qkv.bias", "up.weight", "up.bias", "down.weight"}


def test_the_model_alone_stays_a_model(tmp_path: Path) -> None:
    save(tmp_path, Size(2, 2))

    def prune(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.delete_checkpoint(1, preserve_model=True)

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        model, _, state = job(gangs, 1)
        manager.load(1, {"model": state["model"]})
        equal(dict(model.state_dict()), dict(job(gangs, 0)[0].state_dict()))

    on_ranks(Size(2, 2), tmp_path, prune)
    assert sc.verify(str(tmp_path)).ok
    on_ranks(Size(1, 4), tmp_path, act)


def test_the_whole_from_parts_and_parts_from_the_whole(tmp_path: Path) -> None:
    """Without `TensorSplit` one process has the whole model, and so it reads and writes it."""
    save(tmp_path / "parts", Size(2, 2))

    def one(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        model, optimizer, _ = job(gangs, 1)
        manager.resume({"model": model, "optimizer": optimizer})
        equal(contents(model, optimizer), expected(gangs))

    def write(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        model, optimizer, _ = job(gangs, 0)
        manager.save(2, {"model": model, "optimizer": optimizer}).result()

    def part(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        model, optimizer, state = job(gangs, 1)
        manager.resume(state)
        equal(contents(model, optimizer), expected(gangs))

    on_ranks(Size(1), tmp_path / "parts", one)
    on_ranks(Size(1), tmp_path / "whole", write)
    on_ranks(Size(1, 2), tmp_path / "whole", part)


def test_given_back_without_a_state(tmp_path: Path) -> None:
    """On the ranks that saved, each gets its own part; one process the whole; others are told."""
    save(tmp_path, Size(2, 2))

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> bool:
        model = manager.load_checkpoint(1)["model"]
        return same({k: v for k, v in expected(gangs).items() if " " not in k}, dict(model))

    assert on_ranks(Size(2, 2), tmp_path, act) == [True] * 4

    def refused(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        with pytest.raises(sc.CheckpointMismatchError, match="sharded: model"):
            manager.load_checkpoint(1)

    on_ranks(Size(1, 4), tmp_path, refused)


def test_copies_that_are_none_are_found(tmp_path: Path) -> None:
    """Data-parallel ranks are taken to hold a part alike, and only one writes it."""

    def act(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        model, _, state = job(gangs, 0)
        if gangs.root.rank == 3:
            with torch.no_grad():
                model.get_parameter("up.weight")[0, 0] += 1
        with pytest.raises(sc.CheckpointSaveError, match=r"model\.up\.weight \(for example ranks 1 and 3\)"):
            manager.save(1, state).result()

    on_ranks(Size(2, 2), tmp_path, act)


def test_ranks_that_do_not_agree_and_parts_that_do_not_fit(tmp_path: Path) -> None:
    def unlike(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        layer = nn.Linear(2, 2 + gangs.tp.rank)
        with pytest.raises(sc.CheckpointSaveError, match=r"model\.(weight|bias): ranks do not agree"):
            manager.save(1, {"model": sc.TensorSplit(layer, {"*": 0})}).result()

    def unfit(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        for rule, told in (
            (sc.Split(0, sizes=(2, 3)), "sizes"),
            (sc.Split(0, sections=(3, 1)), "sections"),
            (2, "dim"),
        ):
            with pytest.raises(sc.CheckpointError, match=rf"model\.weight.*{told}"):
                manager.save(1, {"model": sc.TensorSplit(nn.Linear(2, 2), {"weight": rule})}).result()

    on_ranks(Size(1, 2), tmp_path, unlike)
    on_ranks(Size(1, 2), tmp_path, unfit)
    with pytest.raises(ValueError, match="no dimension"):
        sc.TensorSplit(nn.Linear(2, 2), {"weight": "rows"})  # type: ignore[dict-item]


class Experts(nn.Module):
    """A router that all have, and of six experts those that are dealt to this rank."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.router = nn.Linear(3, 6)
        self.experts = nn.ModuleDict({str(number): nn.Linear(3, 3) for number in range(rank, 6, size)})


def dealt(gangs: sc.Gangs, number: float) -> tuple[Experts, torch.optim.Optimizer, dict[str, Any]]:
    """Every tensor, and its moments, have numbers of their own."""
    model = Experts(gangs.dp.rank, gangs.dp.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for name, parameter in model.named_parameters():
        own = number * sum(map(ord, name))
        parameter.data.fill_(own)
        optimizer.state[parameter] = {"step": torch.tensor(number)}
        optimizer.state[parameter] |= {key: torch.full_like(parameter, own + 1) for key in ("exp_avg", "exp_avg_sq")}
    return model, optimizer, {"model": sc.TensorSplit(model, {"experts.*": "own"}), "optimizer": optimizer}


@pytest.mark.parametrize("before", [1, 2, 4, 8])
def test_experts_on_any_number_of_ranks(tmp_path: Path, before: int) -> None:
    """Data-parallel ranks that share out the experts, with their moments; two of eight have none."""

    def save_them(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.save(1, dealt(gangs, 2.0)[2]).result()

    def load_them(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        model, optimizer, state = dealt(gangs, 1.0)
        manager.resume(state)
        equal(contents(model, optimizer), contents(*dealt(gangs, 2.0)[:2]))

    on_ranks(Size(before), tmp_path, save_them)
    for after in {1, 3, 8, before}:
        on_ranks(Size(after), tmp_path, load_them)


def test_experts_on_the_same_ranks_that_now_have_all_of_them(tmp_path: Path) -> None:
    """As many ranks as before, but of another parallelism: a rank's own groups are no longer all that it needs."""

    def save_them(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        manager.save(1, dealt(gangs, 2.0)[2]).result()

    def load_all(manager: sc.CheckpointManager, gangs: sc.Gangs) -> None:
        model, optimizer, _ = dealt(sc.Gangs.local(), 1.0)
        manager.resume({"model": model, "optimizer": optimizer})
        equal(contents(model, optimizer), contents(*dealt(sc.Gangs.local(), 2.0)[:2]))

    on_ranks(Size(2), tmp_path, save_them)
    on_ranks(Size(2), tmp_path, load_all)
