"""Texts, or pairs of texts, as tokens for a model with a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN_LENGTH = 1_000_000
"""Tokenizers that do not know their model's length say a number far above this one."""


@dataclass(frozen=True)
class InputRow:
    """A row as tokens with what is to be predicted of it; without a label, an input alone."""

    input_ids: list[int]
    length: int
    """Tokens before the row was cut to max_length."""
    label: Any = None
    """A class number, a 0 or 1 for each class, a number, or a class number for each token."""
    types: list[int] | None = None
    """0 for tokens of the first text and 1 for those of the second, where the model asks."""

    @property
    def truncated(self) -> bool:
        return self.length > len(self.input_ids)


def longest_input(tokenizer: PreTrainedTokenizerBase, max_length: int, context: int | None) -> int:
    """Return the most tokens a row may have: `max_length`, or the model's context if shorter."""
    own = int(getattr(tokenizer, "model_max_length", UNKNOWN_LENGTH))
    limits = [max_length, own if own < UNKNOWN_LENGTH else max_length, context or max_length]
    return min(limits)


def encode_texts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    second: Sequence[str] | None = None,
) -> list[InputRow]:
    """Return texts, or pairs of texts, as tokens with the tokenizer's special ones around them."""
    pair = None if second is None else list(second)
    whole: Any = tokenizer(list(texts), pair, verbose=False)
    cut: Any = tokenizer(list(texts), pair, verbose=False, truncation=True, max_length=max_length)
    types = cut.get("token_type_ids", [None] * len(texts))
    return [
        InputRow(list(ids), len(full), types=None if each is None else list(each))
        for ids, full, each in zip(cut["input_ids"], whole["input_ids"], types, strict=True)
    ]
