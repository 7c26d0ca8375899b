"""Where a fast path is worth trying, read from a class's source; whether it fits, a trial says."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from inlay.model.fast.source import assigned, computes_as, text, variables
from inlay.model.seams.transformers import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from inlay.storage.registry import layer_class

SLICED = "slice_logits_to_keep(hidden_states, logits_to_keep)"
OUTPUT = frozenset({"outputs", "hidden_states", "logits", "loss"})
"""All that the forward of a head on `outputs[0]` may assign: it passes on what it is given."""
MAKES_MASKS = re.compile(r"\bcreate_(\w+_)?causal_mask\b")


def is_norm(cls: type[nn.Module]) -> bool:
    """Say whether a class reads like the RMS norm."""
    return computes_as(cls, LlamaRMSNorm)


def is_gate(cls: type[nn.Module]) -> bool:
    """Say whether a class reads like the gated feed-forward block."""
    return computes_as(cls, LlamaMLP)


def can_be_last(block: nn.Module) -> bool:
    """Say whether a block reads like one whose feed-forward part acts on each token alone."""
    return computes_as(layer_class(block), LlamaDecoderLayer)


def is_plain_head(model: nn.Module) -> bool:
    """Say whether a model's logits read like its head on the output of its body, and no more."""
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
    """Say whether a forward calls its body with all that it is given, but labels that are read."""
    calls = [expression.split(" = ", 1)[-1] for expression in assigned(cls, "outputs")]
    return (
        variables(cls) <= OUTPUT
        and len(calls) == 1
        and calls[0].startswith("self.model(")
        and not ("labels" in calls[0] and "labels" in text(body))
    )


def makes_causal_masks(model: nn.Module) -> bool:
    """Say whether a model is a decoder of text alone that has transformers make its masks."""
    if not isinstance(model, PreTrainedModel):
        return False
    config: Any = model.config
    return (
        MAKES_MASKS.search(text(type(model))) is not None
        and not getattr(config, "is_encoder_decoder", False)
        and config.get_text_config() is config
    )


def names_attention(model: nn.Module) -> bool:
    """Say whether a module of a model compares the name of its attention with torch's."""
    return any("'sdpa'" in text(type(m)) for m in model.modules())
