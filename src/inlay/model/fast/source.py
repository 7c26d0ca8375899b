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


@cache
def uses(cls: type[nn.Module], name: str) -> frozenset[str]:
    """Return what a class's `forward` does with a variable that it reads.

    That is the function it goes to, with `name=` where it goes there by that keyword, or the kind
    of expression that it stands in.
    """
    found: set[str] = set()
    for node in ast.walk(ast.Module(list(statements(cls)), [])):
        if isinstance(node, ast.Call):
            given = [*node.args, *(k.value for k in node.keywords if k.arg != name)]
            function = ast.unparse(node.func)
            found |= {function for value in given if is_variable(value, name)}
            found |= {f"{function}({name}=)" for k in node.keywords if passes(k, name)}
        elif not isinstance(node, ast.keyword):
            read = any(is_variable(child, name) for child in ast.iter_child_nodes(node))
            found |= {type(node).__name__} if read else set()
    return frozenset(found)


def passes(keyword: ast.keyword, name: str) -> bool:
    """Say whether a call gives a variable by a keyword of its own name."""
    return keyword.arg == name and is_variable(keyword.value, name)


def is_variable(node: ast.AST, name: str) -> bool:
    """Say whether an expression is a variable that is read."""
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)
