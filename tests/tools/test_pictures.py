"""The page in a browser: nothing sticks out on a phone or a desk, light and dark are what was asked for."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from shardckpt.run.retention import KeepLast
from shardckpt.tools.listing import StepLine
from shardckpt.tools.page import pictures
from shardckpt.tools.page.facts import RunFacts
from shardckpt.tools.page.page import page
from tests.cli.test_listing import run
from tests.tools.making import save
from tests.tools.test_page import saved

needs_a_browser = pytest.mark.skipif(
    pictures.browser() is None, reason="no Chromium is installed: apt-get install chromium"
)


def document() -> str:
    """Long names, many steps, many ranks."""
    steps = tuple(
        StepLine(step, f"step_{step}", "committed", "2026-01-01T00:00:00Z", 10**9 + step, 64, ("model", "optimizer"))
        for step in range(0, 10**6, 50_000)
    )
    parts = {"a_part_with_a_name_that_is_" + "long_" * 12: 10**9, "model": 10**8}
    saves = tuple(saved(step, ranks=40) for step in range(300))
    url = f"s3://a-bucket/{'a-long-way-down/' * 8}run"
    return page(RunFacts(url, "2026-01-01T00:00:00", steps, parts, 950_000, saves, "log", str(KeepLast(3))))


@pytest.mark.slow
@needs_a_browser
def test_it_fits_a_phone_and_a_desk_light_and_dark() -> None:
    shades = {}
    for width, scheme in ((390, "dark"), (1280, "light")):
        found = pictures.laid_out(document(), width=width, scheme=scheme)
        assert (found.width, found.height > 1000) == (width, True)
        shades[scheme] = sum(map(int, found.background.strip("rgb()").split(",")))
    assert shades["dark"] < 200 < 600 < shades["light"]


@pytest.mark.slow
@needs_a_browser
def test_pictures_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "WIDTHS", {"phone": 390})
    monkeypatch.setattr(pictures, "laid_out", lambda *_, **__: pictures.Layout(390, 1500, ""))
    save(tmp_path / "run", 1, 2)
    to, shots = tmp_path / "page.html", tmp_path / "shots"
    status, told, said = run("report", tmp_path / "run", "--to", to, "--png", shots)
    paths = [shots / f"phone-{scheme}.png" for scheme in pictures.SCHEMES]
    assert (status, told, to.is_file()) == (0, "", True)
    assert said.splitlines() == [f"{path} has been written" for path in (to, *paths)]
    contents = [path.read_bytes() for path in paths]
    assert contents[0] != contents[1]
    for content in contents:
        assert content.startswith(b"\x89PNG")
        assert struct.unpack(">II", content[16:24]) == (390, 1500)
        assert len(content) > 20_000  # something is on it


def test_without_a_browser_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "browser", lambda: None)
    save(tmp_path / "run", 1)
    status, _, said = run("report", tmp_path / "run", "--to", tmp_path / "a.html", "--png", tmp_path / "shots")
    assert (status, "none of chromium, " in said) == (2, True)
