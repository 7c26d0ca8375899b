"""Rows of prompts: what a model is to answer, and the columns that its answers are judged by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inlay.data.chat import own_template
from inlay.data.fields import EmptyFieldError, filled, is_missing, present, template_parts
from inlay.data.preference import check_alike, messages
from inlay.data.raw import RawRow
from inlay.data.rows import Rows, group_of, shaped
from inlay.data.text_reader import token_ids
from inlay.data.tokens import Encoded
from inlay.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = "prompt"


# Rows


def are_prompts(row: RawRow, prompt: str | None, needed: Iterable[str]) -> bool:
    """Return whether a row has a prompt and the columns that the rewards read."""
    named = {name for _, name in template_parts(prompt)} - {None} if prompt else {PROMPT}
    asked = {prompt} if prompt in row.values else named or {prompt}
    return all(name in row.values for name in (*asked, *needed))


def normalise_prompts(
    raw: Sequence[RawRow],
    *,
    prompt: str | None = None,
    needed: Mapping[str, str] | None = None,
    group: str | None = None,
    skip_empty: bool = False,
) -> Rows:
    """Return rows of `prompt`, with every other column as it stands, every one checked.

    A prompt is text, or a list of messages that ends in one of the user. Unless a group says
    otherwise, rows of one prompt stay on one side of a split.

    Args:
        raw: the rows as read; at least one.
        prompt: the column with the prompt where it is not `prompt`, or a template with columns in
            braces: `"Question: {question}"`.
        needed: the columns that every row must have something in, each with who needs it.
        group: a column whose equal values `split` keeps together, such as a patient's id.
        skip_empty: leave out rows with an empty field and list their lines in `skipped`.
    """
    if not raw:
        raise DataError("there are no rows; training needs at least one")
    column = prompt or PROMPT
    talks = isinstance(raw[0].values.get(column), list)

    def checked(row: RawRow) -> dict[str, Any]:
        if column in raw[0].values:
            check_alike(row, raw[0], [column], talks)
        found = conversation(row, column) if talks else filled(row, column, raw[0])
        for name, needs in (needed or {}).items():
            check_there(row, name, needs)
        return {**row.values, PROMPT: found}

    groups = same_prompt if group is None else lambda row, _: group_of(row, group)
    return shaped(raw, "prompt", checked, groups, skip_empty)


def same_prompt(row: RawRow, found: dict[str, Any]) -> str:
    del row
    return json.dumps(found[PROMPT], sort_keys=True)


def check_there(row: RawRow, column: str, needs: str) -> None:
    """Raise when a row has nothing in a column that a reward reads."""
    try:
        value = present(row, column)
    except DataError as error:
        raise DataError(f"{error} The reward {needs} reads it") from None
    if is_missing(value):
        raise EmptyFieldError(
            f"{row.where}: {column!r} is empty, and the reward {needs} reads it; fill it in, or "
            "leave such rows out with skip_empty"
        )


def conversation(row: RawRow, column: str) -> list[dict[str, Any]]:
    """Return a prompt of messages, the last of them the user's."""
    found = messages(row, column)
    if found[-1]["role"] != "user":
        raise DataError(
            f"{row.where}: the prompt must end in a message of 'user', which the model answers; "
            f"it ends in one of {found[-1]['role']!r}"
        )
    return found


# Tokens


def encode_prompts(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded]:
    """Return the prompts as the tokens that an answer follows; none of them is trained on.

    Args:
        rows: rows that `normalise_prompts` returned.
        tokenizer: the model's tokenizer.
        max_length: tokens that a prompt may have; none is cut.
    """
    if isinstance(rows.rows[0][PROMPT], str):
        found = token_ids(tokenizer, [row[PROMPT] for row in rows.rows])
    else:
        template = own_template(tokenizer)
        found = [chat_prompt(rows, i, tokenizer, template) for i in range(len(rows))]
    for index, ids in enumerate(found):
        if len(ids) > max_length:
            raise DataError(
                f"{rows.where(index)}: the prompt has {len(ids)} tokens, more than max_length "
                f"{max_length}; a prompt is not cut: raise max_length, or shorten it"
            )
    return [Encoded(ids, [False] * len(ids), len(ids)) for ids in found]


def chat_prompt(
    rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase, template: str
) -> list[int]:
    """Return a conversation's tokens up to where the assistant speaks."""
    from jinja2 import TemplateError

    try:
        found: Any = tokenizer.apply_chat_template(
            rows.rows[index][PROMPT],
            chat_template=template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
        )
    except TemplateError as error:
        raise DataError(
            f"{rows.where(index)}: the model's chat template refuses the messages: {error}"
        ) from error
    return list(found["input_ids"])
