"""What must stay true of the tree itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHODS = ROOT / "src" / "inlay" / "methods"
CONTRACTS = {"__init__", "base", "catalog", "models", "params"}
FILES = sorted(p for p in METHODS.glob("*.py") if p.stem not in CONTRACTS)


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_method_knows_neither_other_methods_nor_any_storage_format(path: Path) -> None:
    allowed = {"inlay.methods.base", "inlay.methods.models", "inlay.storage.base", "inlay.errors"}
    assert {name for name in imported(path) if name.startswith("inlay")} <= allowed


def test_the_import_rules_name_every_method() -> None:
    rules = (ROOT / ".importlinter").read_text()
    assert re.findall(r"^    inlay\.methods\.(\S+)$", rules, re.MULTILINE) == ["*"]
    let_be = re.findall(r"^    inlay\.methods\.\S+ -> inlay\.methods\.(\w+)$", rules, re.MULTILINE)
    assert set(let_be) == {"base", "models", "params"}


def test_the_smallest_method_is_forty_lines() -> None:
    lines = {p.stem: len(p.read_text().splitlines()) for p in FILES}
    assert min(lines.values()) <= 40, lines


def test_only_one_storage_file_imports_bitsandbytes() -> None:
    sources = (ROOT / "src").rglob("*.py")
    importers = [p for p in sources if any(n.split(".")[0] == "bitsandbytes" for n in imported(p))]
    assert len(importers) <= 1, importers
