"""The source tree keeps its shape: short files, full folders, plain names, visible imports."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "inlay"
LINES = 350
FILES_IN_TRAIN = 25

LONGER: set[str] = set()
"""Files above 350 lines that are let be for now; empty it."""
ALIKE: set[tuple[str, ...]] = set()
"""Names in one folder that differ by their ending alone and are let be for now; empty it."""
CHOSEN_BY_NAME = {
    "__init__.py": 1,
    "cli/main.py": 1,
    "declared.py": 1,
    "tasks/__init__.py": 1,
    "tasks/embed/embedder.py": 1,
}
"""Files that may import a module by a string, with how often: the lazy public names, and folders
in which every file is a variant that is found by its name (methods, storages, verbs, tasks); and
the modules that a folder of sentence-transformers names."""
CHOSEN_FOR_NOW: dict[str, int] = {}
"""Others that are let be for now; empty it."""


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield str(path.relative_to(SOURCE)), path.read_text()


def test_no_file_is_long() -> None:
    longer = {name: text.count("\n") for name, text in sources() if text.count("\n") > LINES}
    assert longer.keys() <= LONGER, longer


def test_train_is_no_flat_hall() -> None:
    files = sorted(path.name for path in (SOURCE / "train").glob("*.py"))
    assert len(files) <= FILES_IN_TRAIN, files


def test_no_names_differ_by_their_ending_alone() -> None:
    """`reward.py` beside `rewards.py` does not say which of them holds what."""
    groups: dict[tuple[Path, str], set[str]] = defaultdict(set)
    for path in SOURCE.rglob("*"):
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py"))):
            groups[path.parent, root(path.stem)].add(path.stem)
    alike = {
        (str(folder.relative_to(SOURCE)), *sorted(names))
        for (folder, _), names in groups.items()
        if len(names) > 1
    }
    assert alike <= ALIKE, alike - ALIKE


def root(word: str) -> str:
    """Return a name without its grammatical ending: label, labels, labelled and labelling."""
    stripped = re.sub(r"(ings?|ers?|ed|es|s|e)$", "", word)
    return re.sub(r"([b-df-hj-np-tv-z])\1$", r"\1", stripped or word)


def test_the_rule_knows_endings() -> None:
    for words in (
        ("label", "labels", "labelled", "labelling"),
        ("judge", "judging", "judged"),
        ("reward", "rewards"),
        ("read", "reader", "reading", "reads"),
    ):
        assert len({root(word) for word in words}) == 1, words
    assert root("merge") != root("metric")
    assert root("kto") != root("orpo")


def test_modules_are_imported_where_a_reader_and_the_linter_see_it() -> None:
    allowed = CHOSEN_BY_NAME | CHOSEN_FOR_NOW
    found = {name: imports_by_string(text) for name, text in sources()}
    more = {name: count for name, count in found.items() if count > allowed.get(name, 0)}
    assert not more


def imports_by_string(text: str) -> int:
    """Return how often a source calls `import_module` or `__import__`."""
    calls = (node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    names = (getattr(func, "attr", getattr(func, "id", "")) for func in calls)
    return sum(name in ("import_module", "__import__") for name in names)
