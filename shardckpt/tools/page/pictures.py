"""The page as PNGs, taken by a Chromium without a window: as a phone and a desk show it, light and dark. No network."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = {"phone": 390, "desktop": 1280}
"""Of the window, in CSS pixels; and of the picture."""
SCHEMES = {"dark": 0, "light": 1}
"""By the number that Blink has for them."""
_TALLEST = 16_000
_PATIENCE_S = 60
_FRAME = """<!doctype html><title>-</title>
<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{document}"
onload="const page = this.contentDocument, all = page.documentElement; document.title = ['measured', all.scrollWidth,
all.scrollHeight, this.contentWindow.getComputedStyle(page.body).backgroundColor].join(';')"></iframe>"""
"""A window of its own is never narrower than 500 pixels."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the browser has laid it out."""

    width: int
    """More than that of the window if one must scroll sideways."""
    height: int
    background: str
    """As "rgb(1, 2, 3)"."""


def browser() -> str | None:
    """The program, if one is installed."""
    return next((found for name in BROWSERS if (found := shutil.which(name)) is not None), None)


def pictures(document: str, folder: str | os.PathLike[str]) -> list[str]:
    """Write `phone-light.png`, ... into a folder, which is made; gives their paths. `OSError` if no browser is there or
    it fails."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    made = []
    for device, width in WIDTHS.items():
        height = min(laid_out(document, width=width, scheme="light").height, _TALLEST)
        for scheme in SCHEMES:
            path = target / f"{device}-{scheme}.png"
            with _page(document) as page:
                _run(page, f"--screenshot={path.resolve()}", width=width, height=height, scheme=scheme)
            if not path.is_file():
                raise OSError(f"the browser made no {path}")
            made.append(str(path))
    return made


def laid_out(document: str, *, width: int, scheme: str) -> Layout:
    """Its measures in a window of that width. `OSError` as above."""
    with _page(_FRAME.format(width=width, document=escape(document))) as page:
        told = _run(page, "--dump-dom", width=max(width, 1000), height=1000, scheme=scheme)
    _, found, rest = told.partition("<title>measured;")
    if not found:
        raise OSError("the browser did not lay the page out")
    right, bottom, background = rest.partition("</title>")[0].split(";")
    return Layout(int(right), int(bottom), background)


@contextmanager
def _page(document: str) -> Iterator[Path]:
    with TemporaryDirectory(prefix="shardckpt-page-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "page.html"
        path.write_text(document, encoding="utf-8")
        yield path


def _run(page: Path, *options: str, width: int, height: int, scheme: str) -> str:
    program = browser()
    if program is None:
        raise OSError(f"PNGs are taken by a browser, and none of {', '.join(BROWSERS)} is installed")
    command = [program, "--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--no-sandbox"] if os.getuid() == 0 else []  # which root cannot have
    command += [
        f"--user-data-dir={page.parent / 'profile'}",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
    ]
    command += [f"--window-size={width},{height}", *options, page.as_uri()]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{program} was not done after {_PATIENCE_S} s") from error
    if ended.returncode:
        raise OSError(f"{program} ended with {ended.returncode}: {ended.stderr.strip()[-300:]}")
    return ended.stdout
