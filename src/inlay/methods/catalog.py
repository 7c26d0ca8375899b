"""The table of methods, read from the source of their files: listing them imports no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from inlay.declared import (
    COMPUTED,
    PACKAGE,
    Declared,
    bases_of,
    classes_in,
    files_of,
    literal,
    literals,
)
from inlay.errors import AdapterError, did_you_mean

if TYPE_CHECKING:
    from inlay.methods.base import Method

REQUIRED = COMPUTED
"""The default of a hyperparameter that has none."""
TYPES = {"Literal": Literal, "Mapping": Mapping} | {
    t.__name__: t for t in (int, float, bool, str, dict, list, tuple)
}
"""The names that annotations of hyperparameters may use."""


@dataclass(frozen=True)
class FieldSpec:
    """One hyperparameter: its type, its default (`...` when required) and its choices if few."""

    name: str
    annotation: str
    type: Any
    default: Any

    @property
    def choices(self) -> tuple[str, ...]:
        """The words it is limited to; empty when it is not a Literal."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()


@dataclass(frozen=True)
class MethodSpec(Declared):
    """A method as its source describes it."""

    kind: str
    equation: str
    paper: str
    learning_rate_factor: float
    default_targets: str | tuple[str, ...]
    peft_type: str | None
    mergeable: bool
    fields: Mapping[str, FieldSpec]

    @property
    def summary(self) -> str:
        first = " ".join(self.doc.split("\n\n")[0].split())
        return first.split(". ")[0].rstrip(".") + "."


@cache
def catalog() -> Mapping[str, MethodSpec]:
    """Return every method by the name users give it, in alphabetical order."""
    specs = [spec for path in files_of("methods") for spec in specs_in(path)]
    return {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}


def find_method(name: str) -> MethodSpec:
    """Return the method of this name; raise `AdapterError` if there is none."""
    if name not in catalog():
        known = ", ".join(catalog())
        hint = did_you_mean(name, catalog())
        raise AdapterError(f"there is no method {name!r}; there are {known}.{hint}")
    return catalog()[name]


def build_method(name: str, hyperparameters: Mapping[str, object] | None = None) -> Method:
    """Build a method from hyperparameters; imports torch; raise `AdapterError` if one is wrong."""
    spec = find_method(name)
    given = dict(hyperparameters or {})
    for key in given:
        if key not in spec.fields:
            hint = did_you_mean(key, spec.fields)
            raise AdapterError(f"method {name!r} has no hyperparameter {key!r}.{hint}")
    for key, field in spec.fields.items():
        if field.default is REQUIRED and key not in given:
            raise AdapterError(f"method {name!r} needs the hyperparameter {key!r}")
    return spec.load()(**given)


def specs_in(path: Path) -> Iterator[MethodSpec]:
    """Yield the methods that a file defines: classes that set `name` to a string."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = dict(literals(tree.body, {}))
    equation = (ast.get_docstring(tree) or "").split("\n")[0].partition(": ")[2].rstrip(".")
    for node, values in classes_in(tree):
        if isinstance(values.get("name"), str):
            yield spec_of_class(node, values, constants, path, equation)


def spec_of_class(
    node: ast.ClassDef,
    values: Mapping[str, Any],
    constants: Mapping[str, Any],
    file: Path,
    equation: str,
) -> MethodSpec:
    """Describe one class by its body and those of the contracts that it inherits from."""
    inherited = contract_chain(node)
    known: dict[str, Any] = {}
    fields: dict[str, FieldSpec] = {}
    for base in inherited:
        known |= dict(literals(base.body, {}))
        fields |= dict(fields_of(base, {}))
    known |= values
    return MethodSpec(
        name=known["name"],
        class_name=node.name,
        file=file,
        doc=ast.get_docstring(node) or "",
        kind=inherited[1].name if len(inherited) > 1 else "",
        equation=equation,
        paper=known.get("paper", ""),
        learning_rate_factor=known.get("learning_rate_factor", 1.0),
        default_targets=known.get("default_targets", ()),
        peft_type=known.get("peft_type"),
        mergeable=known.get("mergeable", False),
        fields=fields | dict(fields_of(node, constants)),
    )


@cache
def contracts() -> Mapping[str, ast.ClassDef]:
    tree = ast.parse((PACKAGE / "methods" / "base.py").read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def contract_chain(node: ast.ClassDef) -> list[ast.ClassDef]:
    """Return the contract classes that a class inherits from, the most general first."""
    direct = [contracts()[name] for name in bases_of(node) if name in contracts()]
    return [above for base in direct for above in (*contract_chain(base), base)]


def fields_of(node: ast.ClassDef, constants: Mapping[str, Any]) -> Iterator[tuple[str, FieldSpec]]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            annotation = ast.unparse(item.annotation)
            if not annotation.startswith("ClassVar"):
                name = item.target.id
                default = literal(item.value, constants) if item.value else REQUIRED
                yield name, FieldSpec(name, annotation, type_of(annotation), default)


def type_of(annotation: str) -> Any:
    """Return the type an annotation names; only the names in TYPES may stand in it."""
    return eval(annotation, {"__builtins__": {}}, TYPES)
