"""Rows of preferences: a prompt, the answer that is preferred to another, and that other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from inlay.data.conversations import ROLES, turn, turn_list
from inlay.data.fields import present, text_field
from inlay.data.image_columns import hold_images
from inlay.data.images import Placing, pictured, same_images, with_images, without_images
from inlay.data.picture import Picture
from inlay.data.raw import RawRow
from inlay.data.rows import Kind, Rows, Shape, group_of, shaped
from inlay.errors import DataError

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")
FIELDS = ("prompt", *SIDES)


def are_pairs(row: RawRow) -> bool:
    """Return whether a row looks like a preference and not like a supervised row."""
    return all(side in row.values for side in SIDES) and not any(
        name in row.values for name in ("completion", "messages", "text")
    )


def normalise_pairs(
    raw: Sequence[RawRow],
    *,
    group: str | None = None,
    skip_empty: bool = False,
    allow_urls: bool = False,
) -> Rows:
    """Return rows of `prompt`, `chosen` and `rejected`, every one checked.

    The three are text; or `chosen` and `rejected` are lists of messages that end in one of the
    assistant, whole conversations or, beside a `prompt` of messages, that answer alone. Unless a
    group says otherwise, rows of one prompt stay on one side of a split. Where the first row has
    images, all may: see `judged`.

    Args:
        raw: the rows as read; at least one.
        group: a column whose equal values `split` keeps together, such as a patient's id.
        skip_empty: leave out rows with an empty field and list their lines in `skipped`.
        allow_urls: fetch images named by an http(s) address.
    """
    return judged(raw, "preference", pair_shape, SIDES, group, skip_empty, allow_urls)


def judged(
    raw: Sequence[RawRow],
    kind: Kind,
    shape: Callable[[RawRow, str | None], Shape],
    answers: Sequence[str],
    group: str | None,
    skip_empty: bool,
    allow_urls: bool,
) -> Rows:
    """Return rows of judged answers to prompts, which may have images if the first row has some.

    The prompts of rows with images are messages, whose parts are `{"type": "image" | "text"}`, and
    rows of the same images stay on one side of a split.

    Args:
        raw: the rows as read; at least one.
        kind: what the rows are.
        shape: makes of the first row and the group's column what checks a row and shapes it.
        answers: the names of the answers in a shaped row.
        group: as in `normalise_pairs`, and so are skip_empty and allow_urls.
    """
    if not raw:
        raise DataError("there are no rows; training needs at least one")
    if not hold_images(raw[0]):
        return shaped(raw, kind, shape(raw[0], group), grouping(group), skip_empty)

    def place(row: RawRow, found: dict[str, Any], pictures: list[Picture]) -> dict[str, Any]:
        return about_images(row, found, pictures, answers)

    def groups(row: RawRow, found: dict[str, Any]) -> str:
        if group is not None:
            return group_of(row, group)
        return same_images(row, found) if found["images"] else same_prompt(row, found)

    plain = shape(without_images(raw[0])[0], group)
    return pictured(raw, kind, Placing(plain, place, allow_urls), groups, skip_empty)


def about_images(
    row: RawRow, found: dict[str, Any], pictures: list[Picture], answers: Sequence[str]
) -> dict[str, Any]:
    """Return a row whose prompt is messages with images, and whose answers are text.

    A prompt of text becomes a user's message, and the space that its answers took is left out.
    """
    if isinstance(found["prompt"], str):
        alone = {name: found[name].removeprefix(" ") for name in answers}
        found = {**found, **alone, "prompt": [{"role": "user", "content": found["prompt"]}]}
    shown = [with_images(row, [*found["prompt"], said(found[name])], pictures) for name in answers]
    return {**found, "prompt": shown[0]["messages"][:-1], "images": pictures}


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
    """Return the function that gives a row's group: a column's value, else the prompt."""
    return same_prompt if group is None else lambda row, _: group_of(row, group)


def same_prompt(row: RawRow, found: dict[str, Any]) -> str:
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
    """Raise when the two answers are equal, white space around them left out."""
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
    """Return the text of the one message that answers a prompt of messages."""
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
    roles = {role: role for role in ROLES}
    return [turn(row, t, n, "role", "content", roles) for n, t in turn_list(row, name)]


def parted(
    row: RawRow, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what two whole conversations share, and what each adds in its last message."""
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen, rejected, strict=False)
        number = next((n for n, (a, b) in enumerate(pairs, start=1) if a != b), len(chosen))
        raise DataError(
            f"{row.where}: 'chosen' and 'rejected' part at message {number}; two conversations may "
            "differ only in their last message"
        )
    return chosen[:-1], chosen[-1:], rejected[-1:]


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
    return {"role": "assistant", "content": content}
