"""Classes that Inlay's own files declare, read from their source: listing them imports no torch.

The table of methods, or of storages, is the folder of their files: adding a file adds an entry.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
COMPUTED = ...
"""The value of an expression that is no literal."""


@dataclass(frozen=True)
class Declared:
    """A class that users can name, known from its source."""

    name: str
    class_name: str
    file: Path
    doc: str

    @property
    def module(self) -> str:
        """The module that defines the class."""
        return f"inlay.{self.file.parent.name}.{self.file.stem}"

    def load(self) -> Any:
        """Import the class."""
        return getattr(import_module(self.module), self.class_name)


def files_of(room: str) -> list[Path]:
    """Return the files of one of Inlay's folders, in alphabetical order."""
    return sorted((PACKAGE / room).glob("*.py"))


def classes_in(tree: ast.Module) -> Iterator[tuple[ast.ClassDef, dict[str, Any]]]:
    """Yield every class of a file with the literal values that its body sets."""
    constants = dict(literals(tree.body, {}))
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node, dict(literals(node.body, constants))


def literals(body: list[ast.stmt], constants: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the names that a body gives a literal value, class variables among them."""
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                continue
        found = literal(value, constants)
        if found is not COMPUTED:
            yield name, found


def literal(value: ast.expr, constants: Mapping[str, Any]) -> Any:
    """Return the value of a literal, a constant of the file, or `field(default_factory=dict)`."""
    match value:
        case ast.Name(id=name) if name in constants:
            return constants[name]
        case ast.Call(func=ast.Name(id="field"), keywords=[ast.keyword(value=ast.Name(id="dict"))]):
            return {}
        case _:
            try:
                return ast.literal_eval(value)
            except ValueError:
                return COMPUTED


def bases_of(node: ast.ClassDef) -> list[str]:
    """Return the names of the classes that a class inherits from."""
    return [base.id for base in node.bases if isinstance(base, ast.Name)]
