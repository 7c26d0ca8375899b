"""Put the fast paths on a model's modules, and take them off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
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
from inlay.model.source import assigned, computes_as, text, uses, variables

LAYER = re.compile(r"\w*(layer|block)\w*\(attention_mask=\)")
"""A layer that is given the mask."""
SLICED = "slice_logits_to_keep(hidden_states, logits_to_keep)"
OUTPUT = frozenset({"outputs", "hidden_states", "logits", "loss"})
"""All that the forward of a head on `outputs[0]` may assign: it passes on what it is given."""
OTHER_MASKS = ("block_sequence_ids", "and_mask_function", "create_chunked_causal_mask")
"""What stands in a forward whose masks say more than segments do."""
READS = frozenset({
    "create_causal_mask(attention_mask=)", "create_sliding_window_causal_mask(attention_mask=)",
    "mask_function(attention_mask=)", "self.warn_if_padding_and_no_attention_mask",
    "Dict", "NamedExpr", "Compare",
})  # fmt: skip
"""What a decoder may do with its mask so that segments can stand in its place."""


def install(model: nn.Module) -> None:
    """Put the fast paths on a model's modules, in place; on a fast model nothing changes.

    On a CPU the process keeps freed memory from now on, for the steps to come. Where the model has
    torch's own encoder layers, the process calls such layers' modules one by one from now on.
    """
    if is_on("memory") and all(p.device.type == "cpu" for p in model.parameters()):
        keep_memory()
    if any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules()):
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past the layers' adapters
    for module, fast in list(fitting(model)):
        if not isinstance(module, Fast):
            module.__class__ = fast_class(type(module), fast)
    config: Any = getattr(model, "config", None)
    has_segments = any(isinstance(m, FastBackbone) for m in model.modules())
    by_name = any("'sdpa'" in text(type(m)) for m in model.modules())
    if has_segments and not by_name and config._attn_implementation == "sdpa":
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
        elif isinstance(module, PreTrainedModel) and takes_segments(cls):
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


def takes_segments(decoder: type[nn.Module]) -> bool:
    """Say whether a decoder's forward reads its mask for plain causal masks alone.

    Not where positions or biases come from the mask (OPT, Falcon), or it is joined with another
    (images seen both ways, chunks).
    """
    source = text(decoder)
    if "create_causal_mask" not in source or any(word in source for word in OTHER_MASKS):
        return False
    made = any("create_causal_mask(" in value for value in assigned(decoder, "attention_mask"))
    reads = uses(decoder, "attention_mask") - READS
    if made:
        reads = {use for use in reads if not LAYER.fullmatch(use)}
    return reads <= ({"Attribute"} if "attention_mask.ndim < 4" in source else frozenset())
