"""What no rank has a place for: from one bit for each key and rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardckpt.engine.loading.fitting.claims import ALL, by_part, claim, unclaimed

keys = st.sets(st.text("ab.", min_size=1, max_size=4), max_size=12)


@given(keys, st.lists(keys, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_unclaimed_is_what_none_of_the_ranks_knows(saved, known, rng):
    """Ranks may see the saved keys in any order, and know others that were not saved."""
    claims = [claim(rng.sample(sorted(saved), len(saved)), names) for names in known]
    assert list(unclaimed(sorted(saved), claims)) == sorted(saved - set().union(*known))


@given(keys)
def test_a_rank_that_knows_every_key_says_nothing(saved):
    assert claim(sorted(saved), saved | {"more"}) == ALL
    assert list(unclaimed(sorted(saved), ["0", ALL])) == []


def test_claims_by_part():
    assert by_part([{"model": "3", "step": ALL}, {"model": "c"}]) == {"model": ["3", "c"], "step": [ALL]}
