"""Every command and snippet of the documentation's pages runs, in order, in a folder of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from page_blocks import ROOT, RUN, blocks, given, pages
from page_files import MAKERS, STAND_INS

PAGES = pages()
RUNNING = sorted(
    path
    for path, text in PAGES.items()
    if not path.startswith("tasks/")
    and any(b.language in RUN and not b.title and not b.not_run for b in blocks(text))
)
"""Pages with something to run; those of tasks are in test_task_pages.py."""
INSTALLED = "tests/house/test_wheel.py builds the wheel, installs it and runs its command"
MADE = "make runs these, and this test is one of what it runs"
NOT_RUN = {
    ("contributing.md", "bash", MADE),
    ("contributing.md", "python", "tests/docs/test_contributing.py puts it under the first laws"),
    ("guides/parallel.md", "bash", "needs several GPUs, Slurm or Ray; tests/cli/test_parallel.py "
     "reads what these commands write"),
    ("guides/parallel.md", "bash", "tests/cli/test_parallel.py trains on two processes"),
    ("index.md", "bash", INSTALLED),
    ("index.md", "bash", "takes minutes; tests/cli/test_verbs.py runs a smaller demo"),
    ("performance.md", "bash", MADE),
    ("results.md", "bash", "benchmarks/results/radiology.py runs it, on data that are not in "
     "the repository"),
    ("results.md", "yaml", "the keys of benchmarks/results/grpo.py"),
    ("start.md", "bash", INSTALLED),
    ("start.md", "bash", "the run above has ended; tests/train/test_kills.py kills runs and "
     "resumes them"),
    ("tasks/embed.md", "bash", "tests/house/test_wheel.py installs the package; the optional parts "
     "come from PyPI"),
}  # fmt: skip
"""Every block that does not run, with the reason that its page gives."""


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING)
def test_a_page_runs_from_top_to_end(page: str, ran: Callable[[str], Path]) -> None:
    ran(page)


def test_what_is_not_run_is_listed_with_its_reason() -> None:
    found = {
        (page, block.language, block.not_run)
        for page, text in PAGES.items()
        for block in blocks(text)
        if block.not_run
    }
    assert found == NOT_RUN


def test_every_yaml_block_is_a_file_that_a_command_reads() -> None:
    for page, text in PAGES.items():
        for block in blocks(text):
            assert block.language != "yaml" or block.title or block.not_run, (page, block.line)
            assert block.language != "" or block.not_run, (page, block.line, "name its language")


def test_every_file_and_every_model_that_stands_in_is_named_on_a_page() -> None:
    every = "\n".join(PAGES.values())
    assert {name for text in PAGES.values() for name in given(text)} == set(MAKERS)
    assert all(name in every for name in STAND_INS)


def test_every_link_to_a_file_of_the_repository_leads_to_one() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text("utf-8")):
            if generated(page, target):
                continue
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


@pytest.mark.parametrize("reason", sorted({reason for *_, reason in NOT_RUN}))
def test_a_reason_names_only_files_that_there_are(reason: str) -> None:
    for path in re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", reason):
        assert (ROOT / path).is_file()


def test_every_source_file_that_a_page_names_is_there() -> None:
    folders = (ROOT, ROOT / "src" / "inlay", ROOT / "tests")
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"`([\w-]+/[\w./-]+\.(?:py|cpp|h))`", page.read_text("utf-8")):
            assert any((folder / name).is_file() for folder in folders), f"{page.name}: {name}"


def generated(page: Path, target: str) -> bool:
    """Say whether a link leads to a page that is made when the site is built."""
    path = Path(os.path.normpath(page.parent / target))
    return path.is_relative_to(ROOT / "docs") and str(path.relative_to(ROOT / "docs")) in PAGES
