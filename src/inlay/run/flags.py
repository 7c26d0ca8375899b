"""The command's flags, from a pydantic model's fields, and what their text stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel

from inlay.run.run_file import RunLoader
from inlay.run.sentences import choices, expected, properties


@dataclass(frozen=True)
class Flag:
    """What the command needs to know to offer one key as a flag."""

    key: str
    """The key in the run file, and the key to hand to `load_config`."""
    help: str
    default: object
    choices: tuple[str, ...]
    expected: str
    """What a value looks like, in words: `a whole number of at least 1`."""
    kind: Literal["switch", "value", "list", "pairs"]
    """A switch takes no value (`--x`, `--no-x`), a list one or more, pairs `name=value` ones."""

    @property
    def option(self) -> str:
        """The flag as typed: `--learning-rate`."""
        return "--" + self.key.replace("_", "-")


def flags_of(definition: type[BaseModel]) -> list[Flag]:
    """Return a flag for every field of a pydantic model."""
    schema = properties(definition)
    return [
        Flag(
            key=key,
            help=field.description or "",
            default=None if field.is_required() else field.get_default(call_default_factory=True),
            choices=choices(schema[key]),
            expected=expected(schema[key]),
            kind=flag_kind(schema[key]),
        )
        for key, field in definition.model_fields.items()
    ]


def flag_kind(schema: Mapping[str, Any]) -> Literal["switch", "value", "list", "pairs"]:
    """Return how a value of this JSON schema is typed on a command line."""
    types = [option.get("type") for option in schema.get("anyOf", [schema])]
    if types == ["boolean"]:
        return "switch"
    if "array" in types:
        return "list"
    return "pairs" if "object" in types else "value"


def from_text(flag: Flag, value: object) -> object:
    """Return the value that a flag's text stands for; anything but text stays as it is."""
    items = [value] if isinstance(value, str) else value
    if flag.kind == "pairs" and isinstance(items, list):
        pairs = [str(item).partition("=") for item in items]
        return {name: scalar(flag, text) for name, _, text in pairs}
    if flag.kind == "list" and isinstance(items, list):
        parsed = [scalar(flag, item) for item in items]
        single = len(parsed) == 1 and "text or" in flag.expected
        return parsed[0] if single else parsed
    return scalar(flag, value)


def scalar(flag: Flag, value: object) -> object:
    """Return a number, a truth value or nothing when the flag takes such and the text is one."""
    if not isinstance(value, str):
        return value
    if "number" in flag.expected or "true or false" in flag.expected or flag.kind == "pairs":
        try:
            return cast("object", yaml.load(value, Loader=RunLoader))
        except yaml.YAMLError:
            return value
    return value
