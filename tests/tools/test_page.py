"""The page of a run: all that is known is on it, nothing is fetched, nothing of others is markup."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import shardckpt as sc
from shardckpt.run.catalog import Catalog
from shardckpt.run.retention import KeepLast
from shardckpt.storage.memory import MemoryObjects
from shardckpt.tools.page.facts import OTHER, RunFacts, gather, space_by_part
from shardckpt.tools.page.page import page
from shardckpt.tools.page.saves import RankSpans, SaveLine, Span, read_saves
from tests.run.making import CONSOLIDATED, commit, record_of
from tests.tools.making import save

_VOID = {"meta", "br", "path"}


class Checked(HTMLParser):
    """Every tag is closed in its order; no address of anything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.styles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        given = dict(attrs)
        assert not {"src", "href", "onload", "onclick"} & given.keys()
        self.styles.append(given.get("style") or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def saved(step: int, *, ranks: int = 2, **facts: object) -> SaveLine:
    at = 1.7e9 + step
    spans = (Span("save", at, 0.01), Span("stage", at, 0.2), Span("write", at + 0.3, 1.5), Span("seal", at, 0.1))
    line = SaveLine("committed", step, at + 2, 10**9, 0.01, 2.0, 5e8, ranks - 1, 1.5)
    return replace(line, ranks=tuple(RankSpans(rank, at, spans) for rank in range(ranks)), **facts)


def test_a_run_with_a_log(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with sc.CheckpointManager(root, keep=sc.KeepLast(2)) as manager:
        manager.subscribe(sc.SaveLog(root / "saves.jsonl"))
        from tests.tools.making import small_state

        for step in (1, 2, 3):
            manager.save(step, small_state(step)).result()
    facts = gather(root, keep=KeepLast(1))
    assert [step.step for step in facts.steps] == [2, 3]
    assert [line.event for line in facts.saves if line.event != "deleted"] == ["committed"] * 3
    assert [line.step for line in facts.saves if line.event == "deleted"] == [1]
    assert facts.saves[0].total_s > 0
    assert {"save", "write", "commit"} <= {span.name for span in facts.saves[0].ranks[0].spans}
    assert (facts.parts_step, set(facts.parts)) == (3, {"model", "optimizer", OTHER})
    assert sum(facts.parts.values()) == facts.steps[-1].nbytes
    text = Checked(page(facts)).text
    for said in ("Space by part, step 3", "Over time", "by rank, step 3", "rank 0", "deleted so far", "stays because"):
        assert said in text
    assert "among the last" in text or "last 1" in text


def test_a_run_without_a_log_and_one_without_steps(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    text = Checked(page(gather(tmp_path / "run"))).text
    assert "sc.SaveLog" in text
    assert "Over time" not in text
    (tmp_path / "empty").mkdir()
    assert "there are none" in Checked(page(gather(tmp_path / "empty"))).text
    with pytest.raises(OSError, match="none"):
        gather(tmp_path / "run", log=tmp_path / "none")


def test_what_others_wrote_is_text_and_long_runs_stay_small() -> None:
    bad = "<script>alert('&')</script>"
    saves = [saved(step, ranks=50) for step in range(3000)]
    saves.append(saved(3000, total_s=9.0, ranks=50))
    saves.append(SaveLine("failed", 3001, 1e300, error=bad))
    saves.append(SaveLine("subscriber failed", 3001, 1.0, error="upload: no network"))
    facts = RunFacts(bad, "now", (), {bad: 5, OTHER: 1}, 3000, (*saves, saved(3002)), "log")
    document = page(facts)
    checked = Checked(document)
    assert bad in checked.text
    assert "Callbacks and subscribers that failed" in checked.text
    assert "upload: no network" in checked.text
    assert "<script>" not in document
    assert "The save that took longest, step 3000 (9 s)" in checked.text
    assert "18 faster ranks are not shown" in checked.text
    assert len(document) < 300_000
    assert not [style for style in checked.styles if "nan" in style or "inf" in style]


def test_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    log = tmp_path / "log"
    good = '{"event": "deleted", "step": 1, "at": 2}'
    wrong = [
        "[]",
        "7",
        good[:-2] + "NaN}",
        '{"event": "committed"}',
        "[" * 10000,
        "",
        '{"event": "x", "step": "y", "at": 1}',
    ]
    log.write_text("\n".join([good, *wrong, good[:-4]]))
    assert read_saves(log) == [SaveLine("deleted", 1, 2.0)]


def test_space_by_part() -> None:
    store = MemoryObjects("run")
    commit(store, 1, shape=CONSOLIDATED)
    record = Catalog(store).record(1)[1]
    parts = space_by_part(record)
    model = next(file.nbytes for file in record.files if file.kind == "consolidated")
    assert parts == {"whole model once more": model, "model": 8, "metadata": 4, "copies of files": 2}
    assert space_by_part(record_of(1, "0" * 10, files={"rank_0.pt": b"0" * 40}))[OTHER] == 24


def test_of_another_rank_the_writing_is_what_it_was_seen_to_do(tmp_path: Path) -> None:
    """Rank 0 hears of a rank's phases before that one's writing is over."""
    phases = [["save", 9.0, 0.1], ["stage", 9.2, 0.3], ["meet", 9.1, 0.5], ["seal", 9.7, 0.1], ["put", 9.8, 0.4]]
    line = {"event": "committed", "step": 1, "at": 10.0, "ranks": [[1, 9.0, phases]]}
    (tmp_path / "log").write_text(json.dumps(line))
    ((rank,),) = (line.ranks for line in read_saves(tmp_path / "log"))
    assert [span.name for span in rank.spans] == ["meet", "save", "stage", "seal", "put", "write"]
    assert (rank.spans[-1].began, rank.spans[-1].seconds) == pytest.approx((9.7, 0.5))
