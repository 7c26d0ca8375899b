"""The words for each metric, on the report's page and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Titles:
    """The words for the metrics of a task."""

    words: Mapping[str, str]
    """A metric's name -> its words."""
    curves: Mapping[str, str] = field(default_factory=dict[str, str])
    """What is measured during training beside the loss -> the words above its curve."""

    def __call__(self, name: str) -> str:
        return self.words.get(name, name.replace("_", " "))

    def with_own(self, words: Mapping[str, str], curves: Mapping[str, str] | None = None) -> Titles:
        return Titles({**self.words, **words}, curves or {})


ANSWERS = Titles(
    {
        "loss": "loss, nats per token",
        "perplexity": "perplexity",
        "exact_match": "exact match",
        "token_f1": "token F1",
        "rouge_l": "ROUGE-L",
        "number_match": "number match",
    }
)
"""The metrics of answers as the rows give them."""


def capitalised(words: str) -> str:
    return words[:1].upper() + words[1:]
