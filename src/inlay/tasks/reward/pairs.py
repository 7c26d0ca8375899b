"""Pairs as a reward model reads them: the prompt with either answer behind it, as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from inlay.data.inputs import InputRow, encode_texts
from inlay.data.preference import SIDES, Side
from inlay.data.rows import Rows
from inlay.errors import DataError, ModelError


@dataclass(frozen=True)
class RewardPair:
    """A prompt with either answer behind it, each whole, as tokens."""

    chosen: InputRow
    rejected: InputRow


def encode_reward_pairs(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[RewardPair]:
    """Return both sides of each pair as TRL's RewardTrainer tokenises them, cut to `max_length`.

    Text is followed by the end token, where the tokenizer has one; messages are written by the
    chat template.
    """
    sides = [encoded_side(rows, side, tokenizer, max_length) for side in SIDES]
    pairs = [RewardPair(chosen, rejected) for chosen, rejected in zip(*sides, strict=True)]
    for index, pair in enumerate(pairs):
        if pair.chosen.input_ids == pair.rejected.input_ids:
            needed = max(pair.chosen.length, pair.rejected.length)
            raise DataError(
                f"{rows.where(index)}: cut at {max_length} tokens, 'chosen' and 'rejected' are the "
                f"same; max_length {needed} keeps both whole"
            )
    return pairs


def encoded_side(
    rows: Rows, side: Side, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[InputRow]:
    """Return prompt and answer of one side as tokens."""
    if isinstance(rows.rows[0]["prompt"], str):
        end = tokenizer.eos_token if isinstance(tokenizer.eos_token, str) else ""
        texts = [row["prompt"] + row[side].removesuffix(end or "\0") + end for row in rows.rows]
        return encode_texts(texts, tokenizer, max_length)
    if not tokenizer.chat_template:
        raise ModelError(
            "the rows are conversations and the tokenizer has no chat template; give prompt, "
            "chosen and rejected as text"
        )
    found: list[InputRow] = []
    for row in rows.rows:
        messages = [*row["prompt"], {"role": "assistant", "content": row[side]}]
        written: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        ids = list(written["input_ids"])
        found.append(InputRow(ids[:max_length], len(ids)))
    return found
