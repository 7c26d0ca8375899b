"""The prompt hooks of models with an encoder, which reads embeddings before its text."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, EncoderDecoderCache

from inlay.errors import AdapterError
from inlay.kernels.loss import IGNORED
from inlay.methods.models import encoder_of
from inlay.model.adapters.prompts.cache import check_no_prompt
from inlay.model.adapters.prompts.call import (
    EMBEDDINGS,
    arguments,
    decoder_batch_size,
    embedded,
    is_checkpointed,
    own_forward,
    widen,
    without_prompt,
)
from inlay.model.adapters.prompts.hooks import NewArguments, PromptHook
from inlay.model.seams.transformers import ModelOutput, cache_argument


class EncoderPrompts(PromptHook):
    """The prompt adapters of an encoder, which reads [E; x] at every position.

    Outputs are as long as the text, or with `whole` as long as what the model reads.
    """

    def register(self) -> list[RemovableHandle]:
        body: Any = self.model
        reads = self.model if cache_argument(own_forward(body)) else body.base_model
        return [
            *super().register(),
            reads.register_forward_pre_hook(self.before_body, with_kwargs=True),
            self.model.register_forward_hook(self.shorten),
        ]

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NewArguments:
        method = self.acting(embeddings=True)
        if method is None:
            return None
        call, tokens = arguments(model, args, kwargs), method.tokens
        shape = embedded(call, self.model)
        self.prepend(call, method)
        self.running.read = call[EMBEDDINGS].shape[:2]
        widen(call, "attention_mask", tokens, 1)
        widen(call, "token_type_ids", tokens, 0)
        if self.takes.labels_by_token and getattr(call.get("labels"), "shape", None) == shape:
            widen(call, "labels", tokens, IGNORED)
        if call.pop("position_ids", None) is not None:
            warnings.warn(
                f"position_ids are left out: {type(model).__name__} numbers the virtual tokens and "
                "the text after them by itself",
                stacklevel=3,
            )
        return (), call

    def shorten(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        del model, args
        method, read = self.acting(embeddings=True), self.running.read
        self.running.read = None
        if method is None or read is None or self.whole:
            return None
        if not isinstance(output, ModelOutput):
            return without_prompt(output, "", read, method.tokens)
        for name, value in list(output.items()):
            output[name] = without_prompt(value, name, read, method.tokens)
        return output

    def before_body(
        self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NewArguments:
        method = self.acting(embeddings=False)
        return method and self.with_keys(body, args, kwargs, method.tokens)


class EncoderDecoderPrompts(PromptHook):
    """The prompt adapters of an encoder-decoder.

    The encoder reads [E; x]; the decoder reads keys and values before its text. So it is in HF
    PEFT, whose layout gives the decoder's layer i the pair 2 i modulo the number of layers.
    """

    def register(self) -> list[RemovableHandle]:
        encoder: nn.Module = encoder_of(self.model)
        return [
            *super().register(),
            encoder.register_forward_pre_hook(self.before_encoder, with_kwargs=True),
        ]

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NewArguments:
        method = self.acting()
        if method is None:
            check_no_prompt(*args, *kwargs.values())
            return None
        call, tokens = arguments(model, args, kwargs), method.tokens
        if method.has_embeddings:
            widen(call, "attention_mask", tokens, 1)
            return (), call
        widen(call, "decoder_attention_mask", tokens, 1)
        _, new = self.put_cache(model, call, decoder_batch_size(call))
        if new and model.training and torch.is_grad_enabled() and is_checkpointed(model):
            raise AdapterError(
                "gradient checkpointing drops the key-value cache of an encoder-decoder, and the "
                "prefix with it; turn it off (gradient_checkpointing=False), or use prompt tuning"
            )
        return (), call

    def before_encoder(
        self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NewArguments:
        method = self.acting(embeddings=True)
        if method is None:
            return None
        call = arguments(encoder, args, kwargs)
        _, length = embedded(call, encoder)
        self.prepend(call, method)
        mask = call.get("attention_mask")
        if mask is not None and mask.shape[1] == length:  # a call that the model did not make
            widen(call, "attention_mask", method.tokens, 1)
        return (), call

    def filled(self, cache: Any, batch: int) -> Cache:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cache is None else cache
        found = self.keys_values()
        pairs = [found[2 * layer % len(found)] for layer in range(len(found))]
        self.fill(cache.self_attention_cache, batch, pairs)
        return cache
