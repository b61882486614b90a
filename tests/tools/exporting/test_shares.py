"""Who writes which bytes: all of them, each once, as evenly as can be."""

from __future__ import annotations

import random

import pytest

from shardckpt.tools.exporting.shares import Stretch, share_out

MIB = 1 << 20
LEAST = 4 * MIB


def of_file(shares: list[list[Stretch]], file: int) -> list[Stretch]:
    return sorted((s for share in shares for s in share if s.file == file), key=lambda s: s.start)


@pytest.mark.parametrize("least", [LEAST, None])
def test_every_byte_is_written_once(least: int | None) -> None:
    chance = random.Random(4)
    for _ in range(300):
        sizes = [chance.choice([0, 1, chance.randrange(LEAST), chance.randrange(200 * MIB)]) for _ in range(5)]
        ranks = chance.randrange(1, 9)
        shares = share_out(sizes, ranks, least=least)
        assert len(shares) == ranks
        for file, nbytes in enumerate(sizes):
            found = of_file(shares, file)
            assert [s.start for s in found] == [0, *(s.stop for s in found[:-1])]
            assert found[-1].stop == nbytes
            assert [s.whole for s in found] == [len(found) == 1] * len(found)
            assert all(s.start % MIB == 0 for s in found)
            assert len(found) == 1 or (least is not None and all(s.stop - s.start >= least for s in found))
            numbers = [number for s in found for number in s.numbers]
            assert numbers == sorted(set(numbers))
            assert numbers[-1] <= 10_000


@pytest.mark.parametrize("sizes", [[800 * MIB], [5 * MIB] * 200, [1, 790 * MIB, 3 * MIB, 2]])
def test_nobody_has_much_more_than_his_part(sizes: list[int]) -> None:
    shares = share_out(sizes, 8, least=LEAST)
    most = max(sum(s.stop - s.start for s in share) for share in shares)
    assert most <= sum(sizes) / 8 + LEAST + MIB
    whole = share_out([5 * MIB] * 200, 8, least=None)
    assert {sum(s.stop - s.start for s in share) for share in whole} == {125 * MIB}
