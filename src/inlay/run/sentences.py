"""What is wrong with a value, and what one should look like, in words."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError


def validated(
    definition: type[BaseModel], values: Mapping[str, object]
) -> tuple[BaseModel | None, dict[str, str]]:
    """Return the model these values make, or None and one sentence for each wrong key."""
    try:
        return definition(**values), {}
    except ValidationError as error:
        schema = properties(definition)
        problems: dict[str, str] = {}
        for item in error.errors(include_url=False):
            key = str(item["loc"][0])
            if item["type"] == "missing":
                problems[key] = f"{key!r} is missing: {definition.model_fields[key].description}"
            else:
                problems[key] = wrong(key, values[key], expected(schema[key]))
        return None, problems


def wrong(key: str, value: object, wanted: str) -> str:
    return f"{key!r} must be {wanted}, not {shortened(value)}"


def shortened(value: object) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlevel = 2
    return short.repr(value)


def located(problems: Mapping[str, str], source: str, lines: Mapping[str, int]) -> list[str]:
    """Return the problems in the order of the file, each with its file and line if known."""
    ordered = sorted(problems, key=lambda key: lines.get(key, 1 << 30))
    places = {key: f"{source}:{lines[key]}: " for key in problems if key in lines}
    return [places.get(key, "") + problems[key] for key in ordered]


@cache
def properties(definition: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of every field."""
    return definition.model_json_schema()["properties"]


def choices(schema: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(schema.get("enum", ()))


def expected(schema: Mapping[str, Any]) -> str:
    """Return in words what a JSON schema asks for."""
    if "anyOf" in schema:
        return " or ".join(expected(option) for option in schema["anyOf"])
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(repr(word) for word in schema["enum"])
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "null": "nothing",
        "object": "a mapping from names to values",
        "string": "text",
    }
    if schema.get("type") == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        count = f"{least} " if least == most else "one or more " if least else ""
        items = schema.get("items", {})
        return f"a list of {count}" + {"number": "numbers", "integer": "whole numbers"}.get(
            str(items.get("type")), "texts"
        )
    return words.get(str(schema.get("type")), "a value") + bounds(schema)


def bounds(schema: Mapping[str, Any]) -> str:
    """Return the limits of a number in words."""
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    limits = [f"{text} {schema[name]}" for name, text in words.items() if name in schema]
    return " " + " and ".join(limits) if limits else ""
