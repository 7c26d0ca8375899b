"""Conversations: a row's turns as messages of known roles that can be trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from inlay.data.fields import EmptyFieldError, is_missing, present, text_field, text_in
from inlay.data.raw import RawRow
from inlay.errors import DataError, did_you_mean

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}


def messages_row(row: RawRow) -> dict[str, Any]:
    turns = turn_list(row, "messages")
    roles = {role: role for role in ROLES}
    return conversation(row, [turn(row, t, n, "role", "content", roles) for n, t in turns])


def sharegpt_row(row: RawRow) -> dict[str, Any]:
    """Return a ShareGPT conversation, its speakers renamed."""
    turns = turn_list(row, "conversations")
    if "role" in turns[0][1]:
        keys, roles = ("role", "content"), {role: role for role in ROLES}
    else:
        keys, roles = ("from", "value"), SHAREGPT_ROLES
    messages = [turn(row, t, n, *keys, roles) for n, t in turns]
    if not is_missing(row.values.get("system")):
        messages.insert(0, {"role": "system", "content": text_field(row, "system")})
    return conversation(row, messages)


def turn_list(row: RawRow, name: str) -> list[tuple[int, Mapping[str, Any]]]:
    """Return a conversation's turns, numbered from 1."""
    value = present(row, name)
    if isinstance(value, str):
        value = None if is_missing(value) else parsed(value)
    if is_missing(value) or value == []:
        raise EmptyFieldError(f"{row.where}: {name!r} holds no messages")
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"{row.where}: {name!r} must be a list of objects, one a message")
    if row.values.get("tools"):
        raise DataError(f"{row.where}: tools are not supported; take the field 'tools' out")
    return list(enumerate(value, start=1))


def parsed(value: str) -> Any:
    """Return the JSON that a table holds as text, or the text itself if it is not JSON."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def turn(
    row: RawRow,
    value: Mapping[str, Any],
    number: int,
    role_key: str,
    content_key: str,
    roles: Mapping[str, str],
) -> dict[str, Any]:
    """Return one message."""
    named = f"message {number}"
    for key in (role_key, content_key):
        if key not in value:
            near = did_you_mean(key, value)
            raise DataError(f"{row.where}: {named} has no {key!r}.{near}")
    for key, extra in value.items():
        if key not in (role_key, content_key) and not (is_missing(extra) or extra == []):
            raise DataError(
                f"{row.where}: {named} has {key!r}, which training would ignore; take it out"
            )
    role = value[role_key]
    if not isinstance(role, str) or role not in roles:
        near = did_you_mean(role, roles) if isinstance(role, str) else ""
        raise DataError(
            f"{row.where}: {named} has the unknown role {role!r}; expected one of "
            f"{', '.join(roles)}.{near}"
        )
    content = text_in(row, value[content_key], f"{content_key!r} of {named}")
    return {"role": roles[role], "content": content}


def conversation(row: RawRow, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a conversation that can be trained on."""
    roles = [message["role"] for message in messages]
    for number, (before, role) in enumerate(pairwise(roles), start=2):
        if role == before:
            raise DataError(
                f"{row.where}: messages {number - 1} and {number} are both of {role!r}; join them "
                "into one"
            )
        if role == "system":
            raise DataError(
                f"{row.where}: message {number} is of 'system', which may only be first"
            )
    if "assistant" not in roles:
        raise DataError(
            f"{row.where}: no message is of 'assistant', so that there is nothing to train on"
        )
    return {"messages": messages}
