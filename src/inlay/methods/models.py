"""A transformers model as prompt methods read it: embeddings, keys and values, shape."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from inlay.errors import AdapterError
from inlay.storage.base import FrozenLinear


def input_embedding(model: Any) -> nn.Embedding:
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise AdapterError(
            f"{type(model).__name__} has no table of token embeddings, which prompt methods need"
        )
    return embedding


def token_rows(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """Return (n, width) embeddings of tokens as the model reads them, its own scale included."""
    with torch.no_grad():
        return embedding(ids.to(table_of(embedding).device))


def table_of(embedding: nn.Embedding) -> FrozenLinear | Tensor:
    """Return the table of a token embedding: its dtype and its device are those of prompts."""
    return embedding if isinstance(embedding, FrozenLinear) else embedding.weight


def cache_of(output: Any) -> Cache:
    """Return the key-value cache in a model's output; raise `AdapterError` if there is none."""
    found = next((value for value in output.values() if isinstance(value, Cache)), None)
    if found is None:
        raise AdapterError(
            "the model gives no key-value cache, which prompt methods need; use a decoder model, "
            "or a weight method such as LoRA"
        )
    return found


def prefilled(model: nn.Module, embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of each layer of the frozen model for embeddings (n, width)."""
    read = embeddings.to(table_of(input_embedding(model)).dtype)
    body: Any = model.base_model
    cache: Any = cache_of(body(inputs_embeds=read[None], use_cache=True))
    return [(layer.keys, layer.values) for layer in cache.layers]


def read_keys(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values, by layer, that a frozen model computes for tokens (1, n).

    An encoder returns no cache, but fills one that is passed in. An encoder-decoder's keys are
    those of its decoder, in the order of HF PEFT's prefixes: pair 2 i modulo the layers for
    layer i.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        out = model(input_ids=ids, decoder_input_ids=ids, use_cache=True)
        both: Any = cache_of(out)
        found = [(x.keys, x.values) for x in both.self_attention_cache.layers]
        placed = list(found)
        for layer in reversed(range(len(found))):
            placed[2 * layer % len(found)] = found[layer]
        return placed
    out = model(input_ids=ids, use_cache=True)
    cache: Any = next((value for value in out.values() if isinstance(value, Cache)), None)
    if cache is None:
        cache, body = DynamicCache(), model.base_model
        parameters = inspect.signature(body.forward).parameters.items()
        names = [name for name, p in parameters if "Cache" in str(p.annotation)]
        body(input_ids=ids, **dict.fromkeys(names[:1], cache))
    return [(x.keys, x.values) for x in cache.layers]


def encoder_of(model: Any) -> Any:
    found = getattr(model, "get_encoder", lambda: None)()
    return found if isinstance(found, nn.Module) and found is not model else None


def attention_shape(config: Any) -> tuple[int, int, int]:
    """Return (layers, key-value heads, head width) of a transformers model's configuration."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    said = getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
    width = said or text.hidden_size // heads
    return text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or heads, width
