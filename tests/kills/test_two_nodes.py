"""torchrun on two nodes, over a link that is slow, and then cut. As root, in a larger run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.nodes import NoNodesError, two_nodes
from tests.kills.elastic import Line
from tests.kills.two_nodes import Play, WrongError
from tests.scorecard import Scale, Scorecard


@pytest.mark.root
@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whole_cut_fewer_lost(tmp_path: Path, scale: Scale, scorecard: Scorecard) -> None:
    if scale.runs(sample=1, full=2) < 2:
        pytest.skip("in a larger run: --scale 2, or `bash launch/nodes.sh`")
    told: list[str] = []
    try:
        with two_nodes() as nodes:
            Play(nodes, tmp_path / "run", told.append).all_acts()
    except NoNodesError as error:
        pytest.skip(f"no network namespaces here: {error}")
    assert [text.partition(":")[0] for text in told] == ["whole", "cut", "fewer", "lost"]
    scorecard.add("torchrun on two nodes, the link cut, a node killed", runs=2, notes="; ".join(told))


def line(word: str, step: int, value: float = 0.0) -> Line:
    return Line(word, rank=0, pid=1, step=step, life=0, at_s=0.0, value=value.hex())


class Ended:
    """A job that is over."""

    def __init__(self, *said: Line) -> None:
        self.said = list(said)

    def report(self) -> str:
        return "report"


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    play = Play(None, tmp_path)
    good = [line("resumed", 2), line("loss", 3, play.losses[3]), line("ended", 3)]
    play._check(Ended(*good), resumed=2, ended=3)
    for resumed, ended, said in (
        (3, 3, good),
        (2, 4, good),
        (2, None, good),
        (2, 3, [*good, line("loss", 4, play.losses[3])]),
    ):
        with pytest.raises(WrongError):
            play._check(Ended(*said), resumed=resumed, ended=ended)
    play.promised = 5
    with pytest.raises(WrongError, match="step 5 was promised"):
        play._steps()
