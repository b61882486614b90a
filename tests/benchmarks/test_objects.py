"""The benchmark of object storage: its tables, and what makes one of its ways differ from the other."""

from __future__ import annotations

import pytest
import torch

from benchmarks.objects import Timings, chosen, told
from benchmarks.several import PAIRS, OneWriter, render, state_of
from shardckpt.storage import MemoryObjects, SharedPuts


def test_a_table_of_several_ranks() -> None:
    seconds = {name: [2.0, 4.0, 3.0] if name.endswith("all") else [1.0, 1.0, 2.0] for pair in PAIRS for name in pair}
    table = render(seconds, 200_000_000, 4)
    assert "4 ranks that hold 0.20 GB alike:" in table
    assert "| save, all ranks put parts | 1.00 (1.00-2.00) | 2.00 (1.50-4.00) x |" in table
    assert "| save, one rank puts all | 3.00 (2.00-4.00) | |" in table


def test_a_table_of_one_process_against_the_best_of_the_others() -> None:
    timings = Timings({"save, shardckpt": [1.0], "save, dcp": [3.0], "put, a": [2.0], "put, b": [0.5]})
    timings.seconds |= {"load, shardckpt": [1.0], "load, dcp": [4.0], "get, a": [0.25]}
    timings.seconds |= {"save, shardckpt, direct": [0.8], "load, shardckpt, direct": [0.5]}
    timings.busy = {**{name: [0.4] for name in timings.seconds}, "save, shardckpt, direct": [0.1]}
    table = told(timings, 10**9)
    assert "| save, shardckpt | 1.00 (1.00-1.00) | 1000 | 0.40 |" in table
    assert "| save: save, dcp | 3.00 (3.00-3.00) | 3.75 (3.75-3.75) | 3 |" in table
    assert "| save: put, b | 0.50 (0.50-0.50) | 0.62 (0.62-0.62) | 0.85 |" in table
    assert "| load: get, a | 0.25 (0.25-0.25) | 0.50 (0.50-0.50) | 0.85 |" in table
    assert "| save, dcp: put, b | 6.00 (6.00-6.00) | 6.00 (6.00-6.00) | |" in table
    assert "| save | 1.25 (1.25-1.25) | 4.00 (4.00-4.00) |" in table
    assert "| load | 2.00 (2.00-2.00) | 1.00 (1.00-1.00) |" in table


def test_one_writer_is_a_storage_that_is_not_shared() -> None:
    inner = MemoryObjects()
    alone = OneWriter(inner)
    assert isinstance(inner, SharedPuts)
    assert not isinstance(alone, SharedPuts)


def test_the_state_is_alike_on_all_ranks_and_new_in_each_round() -> None:
    one, again, other = state_of(1, 4096), state_of(1, 4096), state_of(2, 4096)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert sum(tensor.nbytes for tensor in one.values()) == 4096


def test_bare_clients_are_chosen_by_how_their_names_begin() -> None:
    clients = dict.fromkeys(("put, s3fs, 8", "put, obstore, 8", "get, obstore, 8"), print)
    assert list(chosen(clients, ())) == list(clients)
    assert list(chosen(clients, ["put, obstore", "get"])) == ["put, obstore, 8", "get, obstore, 8"]
    with pytest.raises(SystemExit, match="put, s3fs, 8; put, obstore, 8"):
        chosen(clients, ["obstore"])
