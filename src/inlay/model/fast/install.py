"""Put the fast paths on a model's modules, and take them off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
)

from inlay.kernels.native import keep_memory
from inlay.kernels.switches import is_on
from inlay.model.fast.attention import ATTENTION, FastBackbone
from inlay.model.fast.base import Fast, fast_class
from inlay.model.fast.causal_lm import FastCausalLM
from inlay.model.fast.layers import FastGate, FastLastBlock, FastLinear, FastNorm
from inlay.model.source import assigned, computes_as, text, variables

SLICED = "slice_logits_to_keep(hidden_states, logits_to_keep)"
OUTPUT = frozenset({"outputs", "hidden_states", "logits", "loss"})
"""All that the forward of a head on `outputs[0]` may assign: it passes on what it is given."""


def install(model: nn.Module) -> None:
    """Put the fast paths on a model's modules, in place; on a fast model nothing changes.

    On a CPU the process keeps freed memory from now on, for the steps to come.
    """
    if is_on("memory") and all(p.device.type == "cpu" for p in model.parameters()):
        keep_memory()
    for module, fast in list(fitting(model)):
        if not isinstance(module, Fast):
            module.__class__ = fast_class(type(module), fast)
    config: Any = getattr(model, "config", None)
    has_segments = any(isinstance(m, FastBackbone) for m in model.modules())
    if has_segments and config._attn_implementation == "sdpa":
        config._attn_implementation = ATTENTION


def uninstall(model: nn.Module) -> None:
    """Take the fast paths off: every module is of its own class again."""
    for module in model.modules():
        if isinstance(module, Fast):
            object.__setattr__(module, "__class__", type(module).plain)
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) == ATTENTION:
        config._attn_implementation = "sdpa"


def fitting(model: nn.Module) -> Iterator[tuple[nn.Module, type[Fast]]]:
    """Every module whose source is what a fast path computes, with that path."""
    for module in model.modules():
        cls = type(module)
        if cls is nn.Linear:
            yield module, FastLinear
        elif computes_as(cls, LlamaRMSNorm):
            yield module, FastNorm
        elif computes_as(cls, LlamaMLP):
            yield module, FastGate
        elif isinstance(module, PreTrainedModel) and is_plain_head(cls, type(module.base_model)):
            yield module, FastCausalLM
        elif isinstance(module, PreTrainedModel) and "create_causal_mask" in text(cls):
            yield module, FastBackbone
            layers: Any = getattr(module, "layers", None)
            if layers and computes_as(type(layers[-1]), LlamaDecoderLayer):
                yield layers[-1], FastLastBlock


def is_plain_head(cls: type[nn.Module], body: type[nn.Module]) -> bool:
    """Say whether a model's logits are its head on the output of its body, and nothing more."""
    states = {e.rsplit(".", 1)[-1] for e in assigned(cls, "hidden_states")} - {SLICED}
    return (
        assigned(cls, "logits") == frozenset({"self.lm_head(hidden_states)"})
        and (states <= {"last_hidden_state"} or (states == {"outputs[0]"} and passes_on(cls, body)))
        and "self.loss_function(" in text(cls)
        and "router_logits" not in text(cls)
    )


def passes_on(cls: type[nn.Module], body: type[nn.Module]) -> bool:
    """Say whether a forward calls its body with all that it is given, but labels that are read."""
    calls = [expression.split(" = ", 1)[-1] for expression in assigned(cls, "outputs")]
    return (
        variables(cls) <= OUTPUT
        and len(calls) == 1
        and calls[0].startswith("self.model(")
        and not ("labels" in calls[0] and "labels" in text(body))
    )
