import itertools

import pytest
import torch
from torch import nn

from shardckpt.demo.job import rate_at
from shardckpt.demo.messages import SIZES
from shardckpt.demo.model import Rows, SampleDropout, Transformer, rotate, rotation_table

ALL = Rows(start=0, count=4, total=4)


def model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(SIZES["tiny"])


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("size", "millions"), [("tiny", 0.13), ("small", 3.3), ("medium", 25.4)])
def test_the_sizes_have_the_parameters_that_the_help_promises(size, millions):
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(SIZES[size]).parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.02)


def test_it_gives_a_logit_for_every_byte_after_every_token():
    logits = model()(tokens(), ALL)
    assert logits.shape == (4, 32, 256)
    assert logits.dtype == torch.float32


def test_a_token_sees_nothing_that_comes_after_it():
    net, before = model().eval(), tokens()
    after = before.clone()
    after[:, 20:] = (after[:, 20:] + 1) % 256
    with torch.no_grad():
        one, other = net(before, ALL), net(after, ALL)
    assert torch.equal(one[:, :20], other[:, :20])
    assert not torch.equal(one[:, 20:], other[:, 20:])


def test_attention_depends_on_how_far_apart_tokens_are_and_not_on_where_they_are():
    rotation = rotation_table(32, 16)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).unbind()
    everywhere = [rotate(x.expand(1, 1, 32, 16), rotation)[0, 0] for x in (q, k)]
    scores = everywhere[0] @ everywhere[1].T
    assert torch.allclose(scores[5, 3], scores[25, 23], atol=1e-5)
    assert not torch.allclose(scores[5, 3], scores[5, 4], atol=1e-3)


def test_dropout_drops_the_same_of_a_sample_on_every_mesh():
    drop, x = SampleDropout(0.5), torch.ones(4, 3, 8)

    def dropped(count: int) -> torch.Tensor:
        parts = []
        for start in range(0, 4, count):  # each of these is a rank, which has a generator of its own
            torch.manual_seed(7)
            parts.append(drop(x[start : start + count], Rows(start=start, count=count, total=4)))
        return torch.cat(parts)

    assert torch.equal(dropped(4), dropped(2))
    assert torch.equal(dropped(4), dropped(1))
    assert 0 < int((dropped(4) == 0).sum()) < x.numel()


def test_dropout_leaves_the_generator_at_the_same_place_on_every_mesh():
    places = []
    for rows in (ALL, Rows(start=2, count=2, total=4)):
        torch.manual_seed(7)
        SampleDropout(0.5)(torch.ones(rows.count, 3, 8), rows)
        places.append(torch.get_rng_state())
    assert torch.equal(*places)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    torch.manual_seed(0)
    drop, x = SampleDropout(0.25), torch.ones(4, 100, 100)
    assert drop(x, ALL).mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(drop.eval()(x, ALL), x)


def test_the_same_seed_gives_the_same_weights():
    one, same, other = (nn.utils.parameters_to_vector(model(seed).parameters()) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_rate_warms_up_and_falls_to_a_tenth():
    rates = [rate_at(step, steps=24) for step in range(25)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    assert rates[24] == pytest.approx(0.1)
