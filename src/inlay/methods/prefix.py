"""Prefix tuning: attention reads [P_k; K] and [P_v; V] in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from inlay.errors import AdapterError
from inlay.methods.base import (
    Kind,
    Params,
    PromptMethod,
    checked_positive,
    evaluating,
    lowered,
    stored,
)
from inlay.methods.models import attention_shape, input_embedding, read_keys, table_of


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PromptMethod):
    """Learned keys and values of virtual tokens in every attention layer, before the real ones.

    Shape: (tokens, layers * 2 * kv heads * head width), in the order layer, key or value, head,
    width, as HF PEFT keeps it (without its projection); that many parameters.
    Attaching changes the outputs: attention has more to read. `prefill` starts from the keys and
    values that the frozen model computes for random tokens, which is as if those stood before
    the text and trains far better than `random`, drawn from a unit normal as HF PEFT does.
    Its learning rate is 16 times LoRA's (5e-3 against 3e-4).
    Papers: arXiv 2101.00190; the start from a real prefill 2506.06266.

    Raises:
        AdapterError: tokens not positive, an unknown start, a model without a key-value cache.

    >>> from transformers import LlamaConfig
    >>> shape = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    >>> PrefixTuning(tokens=8).count_for(shape)
    2048
    """

    tokens: int = 32
    start: Literal["prefill", "random"] = "prefill"

    name = "prefix"
    paper = "2101.00190"
    learning_rate_factor = 16.0
    peft_type = "PREFIX_TUNING"
    peft_keys = {"tokens": "num_virtual_tokens"}
    peft_fixed = {"prefix_projection": False}

    def __post_init__(self) -> None:
        checked_positive(self.tokens, "tokens")
        if self.start not in ("prefill", "random"):
            raise AdapterError(f"start must be 'prefill' or 'random', not {self.start!r}")

    def init(self, model: nn.Module, seed: torch.Generator) -> Params:
        embedding = input_embedding(model)
        layers, heads, width = attention_shape(model.config)
        prefix = stored(table_of(embedding), self.tokens, layers * 2 * heads * width)
        if self.start == "random":
            return Params({"prefix": prefix.copy_(torch.randn(prefix.shape, generator=seed))})
        ids = torch.randint(embedding.num_embeddings, (1, self.tokens), generator=seed)
        with torch.no_grad(), evaluating(model):
            pairs = [torch.stack(pair)[:, 0] for pair in read_keys(model, ids.to(prefix.device))]
        return Params({"prefix": prefix.copy_(torch.stack(pairs).movedim(3, 0).flatten(1))})

    def count_for(self, config: object) -> int:
        layers, heads, width = attention_shape(config)
        return self.tokens * layers * 2 * heads * width

    def keys_values(self, p: Params, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        layers, heads, width = attention_shape(model.config)
        table = lowered(p.prefix.to(table_of(input_embedding(model)).dtype))
        table = table.view(1, self.tokens, layers, 2, heads, width).permute(2, 3, 0, 4, 1, 5)
        return [(layer[0], layer[1]) for layer in table]

    def peft_tensors(self, kind: Kind) -> dict[str, str]:
        return {"prefix": "prompt_embeddings"}
