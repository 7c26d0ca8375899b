"""A model's tokenizer as the reader of rows of text: prompts and completions, or conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inlay.data.chat import chat_tokens
from inlay.data.rows import Rows
from inlay.data.summary import Piece, pieces
from inlay.data.tokens import Encoded, common_prefix
from inlay.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Callable[["PreTrainedTokenizerBase"], str | None]
"""Returns the chat template for training; None stands for the tokenizer's own."""


def own(tokenizer: PreTrainedTokenizerBase) -> None:
    del tokenizer


@dataclass(frozen=True)
class TextReader:
    """Reads rows of text: every text is trained, of a completion its own tokens and the end."""

    tokenizer: PreTrainedTokenizerBase
    template: Template = own

    def whole(self, sides: Sequence[Rows], max_length: int) -> list[list[Encoded]]:
        del max_length
        return [self.side(rows) for rows in sides]

    def side(self, rows: Rows) -> list[Encoded]:
        if rows.kind == "messages":
            template = self.template(self.tokenizer)
            return [chat_tokens(rows, i, self.tokenizer, template) for i in range(len(rows))]
        if rows.kind == "prompt_completion":
            return completion_tokens(rows, self.tokenizer)
        return text_tokens(rows, self.tokenizer)

    def pieces(self, row: Encoded) -> list[Piece]:
        return pieces(row, self.tokenizer)


def end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of the token at which generation stops."""
    end = tokenizer.eos_token
    if not isinstance(end, str) or not end:
        raise ModelError(
            "the tokenizer has no end token (eos_token), so that a tuned model would never stop; "
            "set it in the model's tokenizer_config.json"
        )
    return end


def ended(text: str, end: str) -> str:
    return text if text.endswith(end) else text + end


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return each text's tokens, with the tokenizer's special tokens around them."""
    encoding: Any = tokenizer(texts, verbose=False)
    return [list(ids) for ids in encoding["input_ids"]]


def text_tokens(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    end = end_token(tokenizer)
    found = token_ids(tokenizer, [ended(row["text"], end) for row in rows.rows])
    return [Encoded(ids, [True] * len(ids), len(ids)) for ids in found]


def completion_tokens(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Return prompts and completions, trained from where the prompt alone and the row differ."""
    end = end_token(tokenizer)
    prompts = token_ids(tokenizer, [row["prompt"] for row in rows.rows])
    texts = [row["prompt"] + ended(row["completion"], end) for row in rows.rows]
    found: list[Encoded] = []
    for prompt, ids in zip(prompts, token_ids(tokenizer, texts), strict=True):
        start = common_prefix(prompt, ids)
        trained = [False] * start + [True] * (len(ids) - start)
        found.append(Encoded(ids, trained, len(ids), prompt_kept=start == len(prompt)))
    return found
