"""The methods there are, read from the source of their files: listing them imports no torch."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from inlay.errors import AdapterError, did_you_mean

if TYPE_CHECKING:
    from inlay.methods.base import Method

FOLDER = Path(__file__).parent
REQUIRED = ...
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
class MethodSpec:
    """What is known of a method without importing it."""

    name: str
    class_name: str
    module: str
    file: Path
    kind: str
    doc: str
    equation: str
    paper: str
    learning_rate_factor: float
    default_targets: str | tuple[str, ...]
    peft_type: str | None
    mergeable: bool
    fields: Mapping[str, FieldSpec]

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        first = " ".join(self.doc.split("\n\n")[0].split())
        return first.split(". ")[0].rstrip(".") + "."


@cache
def catalog() -> Mapping[str, MethodSpec]:
    """Return every method by the name users give it, in alphabetical order."""
    specs = [spec for path in sorted(FOLDER.glob("*.py")) for spec in specs_in(path)]
    return {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}


def find_method(name: str) -> MethodSpec:
    """Return the method of this name.

    Raises:
        AdapterError: there is none.
    """
    if name not in catalog():
        known = ", ".join(catalog())
        hint = did_you_mean(name, catalog())
        raise AdapterError(f"there is no method {name!r}; there are {known}.{hint}")
    return catalog()[name]


def build_method(name: str, hyperparameters: Mapping[str, object] | None = None) -> Method:
    """Return a method with these hyperparameters; imports torch.

    Raises:
        AdapterError: no such method, an unknown or missing hyperparameter, or a wrong value.
    """
    spec = find_method(name)
    given = dict(hyperparameters or {})
    for key in given:
        if key not in spec.fields:
            hint = did_you_mean(key, spec.fields)
            raise AdapterError(f"method {name!r} has no hyperparameter {key!r}.{hint}")
    for key, field in spec.fields.items():
        if field.default is REQUIRED and key not in given:
            raise AdapterError(f"method {name!r} needs the hyperparameter {key!r}")
    return getattr(importlib.import_module(spec.module), spec.class_name)(**given)


def specs_in(path: Path) -> Iterator[MethodSpec]:
    """Return the methods one file defines: classes that set `name` to a string."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = dict(assignments(tree.body))
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            values = dict(assignments(node.body, constants))
            if isinstance(values.get("name"), str):
                yield spec_of_class(node, values, constants, path, ast.get_docstring(tree) or "")


def spec_of_class(
    node: ast.ClassDef,
    values: Mapping[str, Any],
    constants: Mapping[str, Any],
    path: Path,
    module_doc: str,
) -> MethodSpec:
    """Build the description of one class from its body and the contracts it stands on."""
    inherited = contract_chain(node)
    known: dict[str, Any] = {}
    fields: dict[str, FieldSpec] = {}
    for base in inherited:
        known |= dict(assignments(base.body))
        fields |= dict(fields_of(base, {}))
    known |= values
    return MethodSpec(
        name=known["name"],
        class_name=node.name,
        module=f"inlay.methods.{path.stem}",
        file=path,
        kind=inherited[1].name if len(inherited) > 1 else "",
        doc=ast.get_docstring(node) or "",
        equation=module_doc.split("\n")[0].partition(": ")[2].rstrip("."),
        paper=known.get("paper", ""),
        learning_rate_factor=known.get("learning_rate_factor", 1.0),
        default_targets=known.get("default_targets", ()),
        peft_type=known.get("peft_type"),
        mergeable=known.get("mergeable", False),
        fields=fields | dict(fields_of(node, constants)),
    )


@cache
def contracts() -> Mapping[str, ast.ClassDef]:
    """Return the classes of the contract file by name."""
    tree = ast.parse((FOLDER / "base.py").read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def contract_chain(node: ast.ClassDef) -> list[ast.ClassDef]:
    """Return the contract classes a class stands on, the most general first."""
    names = [base.id for base in node.bases if isinstance(base, ast.Name)]
    direct = [contracts()[name] for name in names if name in contracts()]
    return [above for base in direct for above in (*contract_chain(base), base)]


def assignments(
    body: list[ast.stmt], constants: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, Any]]:
    """Return the names given a literal value in a body, class variables among them."""
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                continue
        found = literal(value, constants or {})
        if found is not REQUIRED:
            yield name, found


def fields_of(node: ast.ClassDef, constants: Mapping[str, Any]) -> Iterator[tuple[str, FieldSpec]]:
    """Return the dataclass fields of a class body: annotated names that are not ClassVar."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            annotation = ast.unparse(item.annotation)
            if not annotation.startswith("ClassVar"):
                name = item.target.id
                default = literal(item.value, constants) if item.value else REQUIRED
                yield name, FieldSpec(name, annotation, type_of(annotation), default)


def literal(value: ast.expr, constants: Mapping[str, Any]) -> Any:
    """Return the value of a literal, a constant of the file, or `field(default_factory=dict)`."""
    match value:
        case ast.Name(id=name) if name in constants:
            return constants[name]
        case ast.Call(func=ast.Name(id="field"), keywords=[ast.keyword(value=ast.Name(id="dict"))]):
            return {}
        case _:
            return literal_or_nothing(value)


def literal_or_nothing(value: ast.expr) -> Any:
    """Return the value of a literal; REQUIRED when it is an expression to be computed."""
    try:
        return ast.literal_eval(value)
    except ValueError:
        return REQUIRED


def type_of(annotation: str) -> Any:
    """Return the type an annotation names; only the names in TYPES may stand in it."""
    return eval(annotation, {"__builtins__": {}}, TYPES)
