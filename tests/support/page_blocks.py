"""The fenced blocks of the documentation's pages, and a runner that takes a page from top to end.

What a page says about its blocks stands in HTML comments, which readers do not see:

    <!-- given: pairs.jsonl -->      files that are there before the first block (page_files.py)
    <!-- not run: why -->            the next block is not run, and why

A block with a title (```yaml title="run.yaml") is a file of that name. The other blocks of bash and
python run, in order, in one folder for each page.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from page_files import STAND_INS, make

from inlay.cli.main import main

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?$")
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
GIVEN = re.compile(r"<!-- given: (.+?) -->")
RUN = ("bash", "python")
FILES = ("yaml", "json", "python")
SHOWN = ("json", "text", "diff", "pycon")
"""Languages that run, that may be files by their title, and that are only shown."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    line: int
    language: str
    title: str | None
    text: str
    not_run: str | None


def hooks() -> Any:
    """Return the module that makes the generated pages."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages() -> dict[str, str]:
    """Return the text of every page by its path in docs/, generated ones included."""
    folder = ROOT / "docs"
    found = {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.md"))
    }
    made = hooks()
    found |= {path: write() for path, write in made.GENERATED.items()}
    found |= {f"methods/{s.name}.md": made.method_page(s) for s in made.catalog().values()}
    return {path: made.with_keys(text) for path, text in found.items()}


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found: list[Block] = []
    lines = iter(enumerate(text.splitlines(), start=1))
    before = ""
    for number, line in lines:
        if line.startswith("```"):
            opened = FENCE.match(line)
            assert opened, f"line {number}: a fence of another form: {line}"
            inside = []
            for _, body in lines:
                if body == "```":
                    break
                inside.append(body)
            reason = NOT_RUN.fullmatch(before)
            found.append(
                Block(
                    number,
                    opened["language"],
                    opened["title"],
                    "\n".join(inside) + "\n",
                    reason and reason[1],
                )
            )
        before = line
    return found


def given(text: str) -> list[str]:
    """Return the files that a page's blocks need."""
    return [name for names in GIVEN.findall(text) for name in names.split(", ")]


def run_page(text: str, folder: Path, shared: Path, small: bool) -> None:
    """Run a page's blocks in a folder; `shared` holds the models that all pages read."""
    for name in given(text):
        make(name, folder)
    names: dict[str, Any] = {"__name__": "page"}
    with at(folder):
        for block in blocks(text):
            if block.not_run or (block.language in SHOWN and not block.title):
                continue
            content = with_stand_ins(block.text, shared)
            if block.title:
                assert block.language in FILES, f"line {block.line}"
                (folder / block.title).write_text(content, encoding="utf-8")
            elif block.language == "python":
                exec(compile(content, f"line {block.line}", "exec"), names)
            else:
                assert block.language == "bash", f"line {block.line}: say why it is not run"
                for words in commands(content):
                    run_command(words, small)


@contextlib.contextmanager
def at(folder: Path) -> Iterator[None]:
    """Work in a folder, as a reader of the page would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def with_stand_ins(text: str, shared: Path) -> str:
    """Return a block with models that need a network replaced by tiny ones of the same kind."""
    for name, write in STAND_INS.items():
        if name in text:
            text = text.replace(name, write(shared))
    return text


def commands(text: str) -> list[list[str]]:
    """Return the words of each command of a bash block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: Sequence[str], small: bool) -> None:
    """Run one `inlay` command in this process; `small` runs take two steps on few rows."""
    assert words[0] == "inlay", f"only inlay runs here; say why {words} does not"
    more = smaller(words) if small else []
    with warnings.catch_warnings():  # a reader sees a warning as a line, and goes on
        warnings.simplefilter("ignore", UserWarning)
        assert main([*words[1:], *more]) == 0, shlex.join(words)


def smaller(words: Sequence[str]) -> list[str]:
    """Return flags that make a command quick, where it does not give them itself."""
    keys = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    task = words[words.index("--task") + 1] if "--task" in words else "sft"
    for word in words[2:]:
        if word.endswith(".yaml"):
            task = yaml.safe_load(Path(word).read_text(encoding="utf-8")).get("task", task)
    wanted = dict(SMALL.get(words[1], {}))
    bare = words[1] == "train" and "--method" in words and "reports" in words
    if words[1] == "eval":
        run = Path(words[words.index("--adapter") + 1], "run.json")
        task = json.loads(run.read_text(encoding="utf-8"))["task"]
    if words[1] in ("train", "eval") and task in WRITES_TEXT and not bare:
        wanted |= {"generate_rows": 1, "generate_tokens": 4}
    return [
        *(["--no-evaluate"] if bare else []),  # the page of a method: train is all that differs
        *(
            word
            for key, value in wanted.items()
            if key not in keys
            for word in (f"--{key.replace('_', '-')}", str(value))
        ),
    ]


WRITES_TEXT = ("sft", "dpo", "kto", "orpo")
SMALL: dict[str, dict[str, int]] = {
    "train": {"max_steps": 2, "max_rows": 60, "eval_rows": 6},
    "plan": {"max_rows": 60},
    "data": {"max_rows": 60},
    "eval": {"max_rows": 8},
    "generate": {"generate_tokens": 4},
    "merge": {"rows": 2},
}
"""Flags by verb that make it quick."""
