"""Where a fast path is worth a trial, read from a class's source; the trial decides."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from inlay.model.seams.transformers import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from inlay.storage.registry import layer_class

SLICED = "slice_logits_to_keep(hidden_states, logits_to_keep)"
OUTPUT = frozenset({"outputs", "hidden_states", "logits", "loss"})
"""The only variables that the forward of a head on `outputs[0]` may assign."""
MAKES_MASKS = re.compile(r"\bcreate_(\w+_)?causal_mask\b")


def is_norm(cls: type[nn.Module]) -> bool:
    return computes_as(cls, LlamaRMSNorm)


def is_gate(cls: type[nn.Module]) -> bool:
    return computes_as(cls, LlamaMLP)


def can_be_last(block: nn.Module) -> bool:
    return computes_as(layer_class(block), LlamaDecoderLayer)


def is_plain_head(model: nn.Module) -> bool:
    """Return whether a model's logits read like its head on the output of its body, and no more."""
    if not isinstance(model, PreTrainedModel):
        return False
    cls, body = type(model), type(model.base_model)
    states = {e.rsplit(".", 1)[-1] for e in assigned(cls, "hidden_states")} - {SLICED}
    return (
        assigned(cls, "logits") == frozenset({"self.lm_head(hidden_states)"})
        and (states <= {"last_hidden_state"} or (states == {"outputs[0]"} and passes_on(cls, body)))
        and "self.loss_function(" in text(cls)
        and "router_logits" not in text(cls)
        and getattr(model, "lm_head", None) is model.get_output_embeddings()
    )


def passes_on(cls: type[nn.Module], body: type[nn.Module]) -> bool:
    """Return whether a forward passes all arguments on to its body, but labels that it reads."""
    calls = [expression.split(" = ", 1)[-1] for expression in assigned(cls, "outputs")]
    return (
        variables(cls) <= OUTPUT
        and len(calls) == 1
        and calls[0].startswith("self.model(")
        and not ("labels" in calls[0] and "labels" in text(body))
    )


def makes_causal_masks(model: nn.Module) -> bool:
    """Return whether a model is a decoder of text alone that has transformers make its masks."""
    if not isinstance(model, PreTrainedModel):
        return False
    config: Any = model.config
    return (
        MAKES_MASKS.search(text(type(model))) is not None
        and not getattr(config, "is_encoder_decoder", False)
        and config.get_text_config() is config
    )


def names_attention(model: nn.Module) -> bool:
    return any("'sdpa'" in text(type(m)) for m in model.modules())


# The statements of a forward


@cache
def statements(cls: type[nn.Module]) -> tuple[ast.stmt, ...]:
    """Return the statements of a class's `forward` without its docstring; none if unreadable."""
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
    return "\n".join(ast.unparse(s) for s in statements(cls))


def computes_as(cls: type[nn.Module], reference: type[nn.Module]) -> bool:
    return bool(text(cls)) and text(cls) == text(reference)


@cache
def variables(cls: type[nn.Module]) -> frozenset[str]:
    found: set[str] = set()
    for node in ast.walk(ast.Module(list(statements(cls)), [])):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return frozenset(found)


@cache
def assigned(cls: type[nn.Module], name: str) -> frozenset[str]:
    found: set[str] = set()
    for node in ast.walk(ast.Module(list(statements(cls)), [])):
        if isinstance(node, ast.Assign) and any(ast.unparse(t) == name for t in node.targets):
            found.add(ast.unparse(node.value))
        elif isinstance(node, ast.AugAssign | ast.AnnAssign) and ast.unparse(node.target) == name:
            found.add(ast.unparse(node))
    return frozenset(found)
