"""What a transformers module computes, read from its source rather than guessed from its name."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

from torch import nn


@cache
def statements(cls: type[nn.Module]) -> tuple[ast.stmt, ...]:
    """Return the statements of a class's `forward`, its docstring left out; none if unreadable."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        return ()
    function = tree.body[0]
    body = function.body if isinstance(function, ast.FunctionDef) else []
    documented = bool(body) and isinstance(body[0], ast.Expr) and ast.get_docstring(tree.body[0])  # type: ignore[arg-type]
    return tuple(body[1:] if documented else body)


@cache
def text(cls: type[nn.Module]) -> str:
    """Return the statements of a class's `forward` without layout and comments."""
    return "\n".join(ast.unparse(s) for s in statements(cls))


def computes_as(cls: type[nn.Module], reference: type[nn.Module]) -> bool:
    """Say whether two classes' `forward` are the same statements."""
    return bool(text(cls)) and text(cls) == text(reference)


@cache
def variables(cls: type[nn.Module]) -> frozenset[str]:
    """Return every variable that a class's `forward` assigns to."""
    found: set[str] = set()
    for node in ast.walk(ast.Module(list(statements(cls)), [])):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return frozenset(found)


@cache
def assigned(cls: type[nn.Module], name: str) -> frozenset[str]:
    """Return every expression that a class's `forward` assigns to a variable."""
    found: set[str] = set()
    for node in ast.walk(ast.Module(list(statements(cls)), [])):
        if isinstance(node, ast.Assign) and any(ast.unparse(t) == name for t in node.targets):
            found.add(ast.unparse(node.value))
        elif isinstance(node, ast.AugAssign | ast.AnnAssign) and ast.unparse(node.target) == name:
            found.add(ast.unparse(node))
    return frozenset(found)
