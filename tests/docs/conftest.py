"""What the tests of the pages share: each page is run once, and its folder kept for the asserts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from page_blocks import pages, run_page

IN_FULL = ("tasks/dpo.md", "tasks/kto.md", "tasks/orpo.md")
"""Pages whose runs are not made smaller, as tests read what the runs reach."""


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what runs a page the first time, and returns the folder it ran in."""
    shared = tmp_path_factory.mktemp("models")
    folders: dict[str, Path] = {}
    texts = pages()

    def run(page: str) -> Path:
        if page not in folders:
            folders[page] = tmp_path_factory.mktemp("page")
            run_page(texts[page], folders[page], shared, small=page not in IN_FULL)
        return folders[page]

    return run
