"""Prompt adapters: virtual tokens before every sequence of a model."""

from __future__ import annotations

from torch import nn

from inlay.model.adapters.prompts.encoder_hooks import EncoderDecoderPrompts, EncoderPrompts
from inlay.model.adapters.prompts.hooks import PromptHook
from inlay.model.adapters.prompts.trial import taken_by

HOOKS: dict[str, type[PromptHook]] = {
    "decoder": PromptHook,
    "encoder": EncoderPrompts,
    "encoder-decoder": EncoderDecoderPrompts,
}


def prompt_hook(model: nn.Module) -> PromptHook:
    """Return the prompt hook that fits a model; raise `AdapterError` where the model takes none."""
    takes = taken_by(model)
    return HOOKS[takes.kind](model, takes)
