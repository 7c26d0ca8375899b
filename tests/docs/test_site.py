"""The docs site builds without a warning, has every page, and reads nothing from the net."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from page_blocks import ROOT, pages

LOADED = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(https?:[^\"\s>]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    for page in pages():
        built = page.removesuffix(".md") + ".html"
        assert (site / built).is_file()
        assert page.startswith("adr/0") or f'href="{built}"' in home, built


@pytest.mark.slow
def test_nothing_is_loaded_from_the_net(site: Path) -> None:
    for page in site.rglob("*.html"):
        found = {a for a in LOADED.findall(page.read_text("utf-8")) if "arxiv.org" not in a}
        assert not found, page
