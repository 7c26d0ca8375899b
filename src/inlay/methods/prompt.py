"""Prompt tuning: the model reads [E; x], E learned embeddings of virtual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.errors import AdapterError
from inlay.methods.base import Kind, Params, PromptMethod, checked_positive, stored
from inlay.methods.models import input_embedding, table_of, token_rows


@dataclass(frozen=True, kw_only=True)
class PromptTuning(PromptMethod):
    """Learned embeddings of virtual tokens before every sequence; the frozen model reads them.

    Their keys and values are computed by the frozen layers, which for a causal model is the same
    as to prepend them. Shape: (tokens, hidden); tokens * hidden parameters.
    Attaching changes the outputs: there is more to read. E starts as the embeddings of
    tokens drawn from the vocabulary, or of `ids` (repeated or cut to `tokens`), or from a unit
    normal. With `submodules` there are as many times `tokens` rows, as HF PEFT has for an
    encoder-decoder (2), whose encoder reads the first `tokens`. Its learning rate is 16 times
    LoRA's.
    Paper: arXiv 2104.08691.

    Raises:
        AdapterError: tokens not positive, an unknown start, an id outside the vocabulary.

    >>> from transformers import LlamaConfig
    >>> PromptTuning(tokens=8).count_for(LlamaConfig(hidden_size=64))
    512
    """

    tokens: int = 32
    start: Literal["vocabulary", "ids", "random"] = "vocabulary"
    ids: tuple[int, ...] = ()
    submodules: int | None = None

    name = "prompt"
    paper = "2104.08691"
    learning_rate_factor = 16.0
    peft_type = "PROMPT_TUNING"
    peft_keys = {"tokens": "num_virtual_tokens", "submodules": "num_transformer_submodules"}
    peft_fixed = {"prompt_tuning_init": "RANDOM"}

    def __post_init__(self) -> None:
        checked_positive(self.tokens, "tokens")
        checked_positive(self.submodules or 1, "submodules")
        if self.start not in ("vocabulary", "ids", "random"):
            raise AdapterError(f"start must be 'vocabulary', 'ids' or 'random', not {self.start!r}")
        if (self.start == "ids") != bool(self.ids):
            raise AdapterError("start='ids' goes with ids=(...), token ids to start from")

    def init(self, model: nn.Module, seed: torch.Generator) -> Params:
        embedding = input_embedding(model)
        vocabulary, width = embedding.num_embeddings, embedding.embedding_dim
        if self.start == "random":
            drawn = torch.randn(self.rows, width, generator=seed)
        else:
            drawn = token_rows(embedding, self.start_ids(vocabulary, seed))
        return Params({"embeddings": stored(table_of(embedding), self.rows, width).copy_(drawn)})

    def start_ids(self, vocabulary: int, seed: torch.Generator) -> Tensor:
        """Return the (rows,) ids whose embeddings E starts as."""
        if self.start == "vocabulary":
            return torch.randint(vocabulary, (self.rows,), generator=seed)
        if not 0 <= min(self.ids) <= max(self.ids) < vocabulary:
            last = vocabulary - 1
            raise AdapterError(f"ids must lie in the vocabulary, 0 to {last}, not {self.ids}")
        return torch.tensor([self.ids[i % len(self.ids)] for i in range(self.rows)])

    def count_for(self, config: Any) -> int:
        return self.rows * config.get_text_config(decoder=True).hidden_size

    @property
    def has_embeddings(self) -> bool:
        return True

    def embeddings(self, p: Params) -> Tensor:
        return p.embeddings

    def peft_tensors(self, kind: Kind) -> dict[str, str]:
        return {"embeddings": "prompt_embeddings"}
