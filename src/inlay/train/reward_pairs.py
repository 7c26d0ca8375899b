"""Pairs as a reward model reads them: encoded, planned and measured; the verbs do so too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from inlay.data.inputs import InputRow, encode_texts
from inlay.data.preference import SIDES, Side
from inlay.data.rows import Rows
from inlay.errors import DataError, ModelError
from inlay.evaluate.outputs import accepted, padded_inputs
from inlay.evaluate.record import ComparisonRecord
from inlay.evaluate.reward_model import compare_rewards
from inlay.evaluate.run import Told
from inlay.memory.devices import Device
from inlay.model.load.heads import Head, head_of
from inlay.run.config import RunConfig
from inlay.train import planning
from inlay.train.head_planning import Planned, full_row, longest_row, reader
from inlay.train.overview import Example, Reading, example_of


@dataclass(frozen=True)
class RewardPair:
    """A prompt with either answer behind it, each whole, as tokens."""

    chosen: InputRow
    rejected: InputRow

    @property
    def length(self) -> int:
        """How many tokens the longer side has, after cutting."""
        return max(len(self.chosen.input_ids), len(self.rejected.input_ids))


def reward_head(seed: int = 0) -> Head:
    """Return the head that gives a row one number."""
    return Head("sequence", seed=seed)


def encode_reward_pairs(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[RewardPair]:
    """Return both sides of each pair as TRL's RewardTrainer tokenises them, cut to `max_length`.

    Text is followed by the end token, where the tokenizer has one; messages are written by the
    chat template.

    Raises:
        DataError: both sides are the same once they are cut.
        ModelError: messages need a chat template, and the tokenizer has none.
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


# The plan


def joined_batch(pairs: Sequence[RewardPair], padding: int, multiple: int) -> dict[str, Tensor]:
    """Return every chosen side and then every rejected one."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    batch = padded_inputs(rows, padding, multiple)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def pairs_to_plan(config: RunConfig, pairs: Sequence[RewardPair], multiple: int) -> planning.Rows:
    """Return the largest batch that the run's order yields, and how much data there is."""
    chosen = planning.largest_batch(config, [pair.length for pair in pairs])
    batch = joined_batch([pairs[i] for i in chosen], 0, multiple)
    tokens = sum(len(p.chosen.input_ids) + len(p.rejected.input_ids) for p in pairs)
    head = reward_head()
    return planning.Rows(batch, len(pairs), tokens, len(pairs), step=step_loss, head=head)


def step_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of a batch, as TRL's RewardTrainer computes it."""
    chosen, rejected = model(**accepted(model, batch)).logits.squeeze(-1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def row_reader(
    config: RunConfig, device: Device, has_data: bool
) -> Callable[[RunConfig], planning.Rows]:
    """Return what works out a run's largest batch; without data, of full length."""

    def prepare(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Planned:
        pairs = encode_reward_pairs(rows, tokenizer, longest_row(config, tokenizer))
        return lambda changed, multiple: pairs_to_plan(changed, pairs, multiple)

    return reader(config, device, prepare if has_data else None, assumed_rows)


def assumed_rows(config: RunConfig) -> planning.Rows:
    """Return a batch of pairs as long as the run and the model allow."""
    pair = RewardPair(full_row(config), full_row(config))
    batch = joined_batch([pair] * config.batch_size, 0, 1)
    return planning.Rows(batch, 0, 0, 0, assumed=True, step=step_loss, head=reward_head())


# What the verbs ask for


def reading(
    config: RunConfig, train: Rows, tokenizer: PreTrainedTokenizerBase
) -> Reading[RewardPair]:
    """Return how pairs are read, and both sides of one shown."""
    longest = longest_row(config, tokenizer)

    def examples(index: int, pair: RewardPair) -> list[Example]:
        where = train.where(index)
        return [example_of(where, getattr(pair, side), tokenizer, side) for side in SIDES]

    return Reading(
        "preference",
        longest,
        lambda part: encode_reward_pairs(part, tokenizer, longest),
        lambda pair: [pair.chosen, pair.rejected],
        examples,
    )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    config: RunConfig,
    **told: Unpack[Told],
) -> ComparisonRecord:
    """Return base against tuned on pairs.

    Raises:
        ModelError: the model gives no single number.
    """
    check_rewards(model)
    return compare_rewards(
        model,
        encode_reward_pairs(rows, tokenizer, longest_row(config, tokenizer)),
        lines=rows.lines,
        **told,
    )


def check_rewards(model: PreTrainedModel) -> None:
    """Raise unless a model gives one number a row."""
    head = head_of(model)
    if head is None or head.purpose != "sequence" or len(head.labels) != 1:
        raise ModelError(
            f"the {type(model).__name__} gives no reward, which is one number a row; choose an "
            "adapter that was trained with --task reward"
        )


def inputs_of(
    model: PreTrainedModel, rows: Rows, tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> list[dict[str, Tensor]]:
    """Return the preferred side of each pair as a batch of its own."""
    check_rewards(model)
    pairs = encode_reward_pairs(rows, tokenizer, longest_row(config, tokenizer))
    batches = [padded_inputs([pair.chosen], 0, 1) for pair in pairs]
    return [accepted(model, batch) for batch in batches]
