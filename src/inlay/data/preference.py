"""Rows of preferences: a prompt, the answer that is preferred to another, and that other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from inlay.data.conversations import ROLES, turn, turn_list
from inlay.data.fields import present, text_field
from inlay.data.read import RawRow
from inlay.data.rows import Rows, Shape, group_of, shaped
from inlay.data.tokens import Encoded, check_trained, common_prefix, cut_to, encode
from inlay.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Pair", "Side", "are_pairs", "encode_pairs", "normalise_pairs", "side_of"]

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")
FIELDS = ("prompt", *SIDES)
UNCUT = 1 << 60
"""More tokens than a row has: the longer side is cut only once both are known."""


@dataclass(frozen=True)
class Pair:
    """A row as tokens: the same prompt before each answer, and only the answer counts."""

    chosen: Encoded
    rejected: Encoded

    @property
    def start(self) -> int:
        """How many tokens the prompt has; the answers begin behind it."""
        return self.chosen.trained.index(True)

    @property
    def whole(self) -> Encoded:
        """The chosen side with its prompt counted, too."""
        return self.chosen.everywhere()

    @property
    def length(self) -> int:
        """How many tokens the longer side has, after cutting."""
        return max(len(self.chosen.input_ids), len(self.rejected.input_ids))


# Rows


def are_pairs(row: RawRow) -> bool:
    """Say whether a row looks like a preference and like nothing supervised."""
    return all(side in row.values for side in SIDES) and not any(
        name in row.values for name in ("completion", "messages", "text")
    )


def normalise_pairs(
    raw: Sequence[RawRow], *, group: str | None = None, skip_empty: bool = False
) -> Rows:
    """Return rows of `prompt`, `chosen` and `rejected`, every one checked.

    The three are text; or `chosen` and `rejected` are lists of messages that end in one of the
    assistant, whole conversations or, beside a `prompt` of messages, that answer alone. Unless a
    group says otherwise, rows of one prompt stay on one side of a split.

    Args:
        raw: the rows as read; at least one.
        group: a column whose equal values `split` keeps together, such as a patient's id.
        skip_empty: leave out rows with an empty field and list their lines in `skipped`.

    Raises:
        DataError: a field that is missing, empty, of another type than in the first row or
            unknown, or two answers that are the same; names file and line.
    """
    if not raw:
        raise DataError("there are no rows; training needs at least one")
    return shaped(raw, "preference", pair_shape(raw[0], group), grouping(group), skip_empty)


def pair_shape(first: RawRow, group: str | None) -> Shape:
    """Return what checks a row and brings it to a prompt and two answers, like the first one."""
    talks = isinstance(first.values.get("chosen"), list)
    shape = conversations if talks else texts

    def checked(row: RawRow) -> dict[str, Any]:
        check_alike(row, first, SIDES, talks)
        found = shape(row)
        check_columns(row, FIELDS, group, "a preference")
        return found

    return checked


def grouping(group: str | None) -> Callable[[RawRow, dict[str, Any]], str]:
    """Return what decides which rows stay together: a column, else the prompt."""
    return same_prompt if group is None else lambda row, _: group_of(row, group)


def same_prompt(row: RawRow, found: dict[str, Any]) -> str:
    """Return what rows of one prompt have in common."""
    del row
    return json.dumps(found["prompt"], sort_keys=True)


def check_alike(row: RawRow, first: RawRow, answers: Sequence[str], talks: bool) -> None:
    """Raise when one row's answers are texts and the first's messages, or the other way round."""
    for name in answers:
        value = present(row, name)
        if value is not None and isinstance(value, list) != talks:
            what = "messages" if talks else "text"
            raise DataError(
                f"{row.where}: {name!r} is of type {type(value).__name__}, but {first.where} holds "
                f"{what}; all rows must be of one kind"
            )


def check_columns(row: RawRow, fields: Sequence[str], group: str | None, what: str) -> None:
    """Raise when a row holds a field that training would ignore."""
    for name, value in row.values.items():
        if name not in (*fields, group) and value is not None:
            raise DataError(
                f"{row.where}: the field {name!r} is not one of {what} ({', '.join(fields)}) and "
                "would be ignored; take it out, or name it as split_by"
            )


def texts(row: RawRow) -> dict[str, Any]:
    """Return a prompt and two answers as text.

    The one space between prompt and answer belongs to the answer, as in supervised rows.
    """
    prompt, chosen, rejected = (text_field(row, name) for name in FIELDS)
    check_different(row, chosen, rejected)
    spaced = [answer[0].isspace() for answer in (chosen, rejected)]
    if spaced[0] != spaced[1]:
        raise DataError(
            f"{row.where}: one of 'chosen' and 'rejected' begins with white space and the other "
            "does not, so that the space alone would tell them apart; begin both alike"
        )
    if not spaced[0] and not prompt.endswith(("\n", "\r")):
        prompt, chosen, rejected = prompt.rstrip(" "), f" {chosen}", f" {rejected}"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def check_different(row: RawRow, chosen: str, rejected: str) -> None:
    """Raise when the two answers are the same, white space around them left out."""
    if chosen.strip() == rejected.strip():
        raise DataError(
            f"{row.where}: 'chosen' and 'rejected' are the same, so that nothing is preferred; "
            "take the row out"
        )


def conversations(row: RawRow) -> dict[str, Any]:
    """Return a prompt of messages and two answers, each the text of one message."""
    chosen, rejected = messages(row, "chosen"), messages(row, "rejected")
    prompt = messages(row, "prompt") if "prompt" in row.values else []
    if not prompt:
        prompt, chosen, rejected = parted(row, chosen, rejected)
    texts = [
        answer_to(row, prompt, name, answer)
        for name, answer in zip(SIDES, (chosen, rejected), strict=True)
    ]
    check_different(row, *texts)
    return {"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}


def answer_to(
    row: RawRow, prompt: Sequence[dict[str, Any]], name: str, answer: Sequence[dict[str, Any]]
) -> str:
    """Return the text of the one message that answers a prompt of messages.

    Raises:
        DataError: there are more, or none, it is not the assistant's, or the prompt asks nothing.
    """
    roles = [message["role"] for message in answer]
    if roles != ["assistant"]:
        raise DataError(
            f"{row.where}: {name!r} must add one message of 'assistant' to the prompt; it adds "
            f"{', '.join(map(repr, roles)) or 'none'}"
        )
    if not prompt or prompt[-1]["role"] != "user":
        raise DataError(
            f"{row.where}: the prompt must end in a message of 'user', which is to be answered"
        )
    return answer[0]["content"]


def messages(row: RawRow, name: str) -> list[dict[str, Any]]:
    """Return a field's messages, each checked."""
    roles = {role: role for role in ROLES}
    return [turn(row, t, n, "role", "content", roles) for n, t in turn_list(row, name)]


def parted(
    row: RawRow, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what two whole conversations share, and what each adds in its last message.

    Raises:
        DataError: they part before their last message.
    """
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen, rejected, strict=False)
        number = next((n for n, (a, b) in enumerate(pairs, start=1) if a != b), len(chosen))
        raise DataError(
            f"{row.where}: 'chosen' and 'rejected' part at message {number}; two conversations may "
            "differ only in their last message"
        )
    return chosen[:-1], chosen[-1:], rejected[-1:]


# Tokens


def encode_pairs(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    chat_template: str | None = None,
) -> list[Pair]:
    """Return the rows as tokens, each side cut at the end to `max_length`.

    An answer begins where prompt and row differ on either side, as TRL's DPOTrainer has it.

    Args:
        rows: rows that `normalise_pairs` returned.
        tokenizer: the model's tokenizer.
        max_length: tokens that prompt and answer keep together.
        chat_template: used instead of the tokenizer's own, for one that marks what is generated.

    Raises:
        DataError: a prompt leaves no token of an answer, or what is left of both is the same.
        ModelError: the tokenizer has no end token, or no chat template that fits the messages.
    """
    sides = [
        encode(side_of(rows, side), tokenizer, UNCUT, chat_template=chat_template) for side in SIDES
    ]
    return paired(rows, sides, max_length)


def paired(rows: Rows, sides: Sequence[Sequence[Encoded]], max_length: int) -> list[Pair]:
    """Return the pairs of uncut rows, chosen and rejected, each side cut to `max_length`.

    Raises:
        DataError: as `encode_pairs`.
    """
    whole = [joint(chosen, rejected) for chosen, rejected in zip(*sides, strict=True)]
    for side in SIDES:
        check_trained([side_tokens(pair, side) for pair in whole], rows, max_length)
    cut = [Pair(shortened(p.chosen, max_length), shortened(p.rejected, max_length)) for p in whole]
    for index, (pair, before) in enumerate(zip(cut, whole, strict=True)):
        if pair.chosen.input_ids == pair.rejected.input_ids:
            needed = 1 + common_prefix(before.chosen.input_ids, before.rejected.input_ids)
            raise DataError(
                f"{rows.where(index)}: cut at max_length {max_length}, 'chosen' and 'rejected' are "
                f"the same; they differ from max_length {needed} on"
            )
    return cut


def side_of(rows: Rows, side: Literal[Side, "completion"]) -> Rows:
    """Return the rows as supervised ones whose answer is the one of this name."""
    if rows.pictured:
        found = [
            {
                "messages": [*row["prompt"], said([{"type": "text", "text": row[side]}])],
                "images": row["images"],
                "completion": row[side],
            }
            for row in rows.rows
        ]
        return replace(rows, kind="images", rows=found)
    if isinstance(rows.rows[0]["prompt"], str):
        found = [{"prompt": row["prompt"], "completion": row[side]} for row in rows.rows]
        return replace(rows, kind="prompt_completion", rows=found)
    found = [
        {"messages": [*row["prompt"], said(row[side])], "completion": row[side]}
        for row in rows.rows
    ]
    return replace(rows, kind="messages", rows=found)


def said(content: Any) -> dict[str, Any]:
    """Return a message of the assistant's."""
    return {"role": "assistant", "content": content}


def side_tokens(pair: Pair, side: Side) -> Encoded:
    """Return one side of a pair."""
    return pair.chosen if side == "chosen" else pair.rejected


def joint(chosen: Encoded, rejected: Encoded) -> Pair:
    """Return two sides with one prompt: the tokens before the first that either side trains."""
    start = min(
        answer_start(chosen),
        answer_start(rejected),
        common_prefix(chosen.input_ids, rejected.input_ids),
    )
    return Pair(answer_from(chosen, start), answer_from(rejected, start))


def answer_start(row: Encoded) -> int:
    """Return where the last stretch of trained tokens begins."""
    before = reversed(range(answer_end(row)))
    return next((i + 1 for i in before if not row.trained[i]), 0)


def answer_end(row: Encoded) -> int:
    """Return where the last trained token ends; a chat template may write more behind it."""
    return max((i + 1 for i, trained in enumerate(row.trained) if trained), default=0)


def answer_from(row: Encoded, start: int) -> Encoded:
    """Return a row whose tokens from `start` on are the answer, and nothing behind it."""
    end = answer_end(row)
    trained = [False] * start + [True] * (end - start)
    return replace(row, input_ids=row.input_ids[:end], trained=trained, length=end)


def shortened(row: Encoded, max_length: int) -> Encoded:
    """Return a row's first tokens; one that is cut no longer ends."""
    found = cut_to(row, max_length)
    return replace(found, ends=row.ends and not found.truncated)
