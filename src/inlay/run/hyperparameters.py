"""The method's own hyperparameters in a run: which there are, and whether these are right."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from inlay.errors import UsageError, did_you_mean
from inlay.methods.catalog import REQUIRED, MethodSpec, catalog
from inlay.run.flags import Flag, flags_of
from inlay.run.sentences import validated, wrong
from inlay.run.synonyms import SYNONYMS


def method_flags(method: str) -> list[Flag]:
    """Return a flag for every hyperparameter of the method of this name."""
    return flags_of(hyperparameter_model(method))


def method_of(name: object) -> tuple[str | None, dict[str, str]]:
    """Return the name, or None, and the problem if no method has it."""
    if isinstance(name, str) and name in catalog():
        return name, {}
    if not isinstance(name, str):
        return None, {"method": wrong("method", name, "the name of a method")}
    return None, {"method": no_such_method(name)}


def no_such_method(name: str) -> str:
    known = ", ".join(catalog())
    return f"there is no method {name!r}; there are {known}.{did_you_mean(name, catalog())}"


@cache
def hyperparameter_model(method: str) -> type[BaseModel]:
    """Return a pydantic model with the method's hyperparameters as fields."""
    spec = spec_of(method)
    fields: dict[str, Any] = {
        name: (field.type, Field(field.default, description=described(method, field.default)))
        for name, field in spec.fields.items()
    }
    strict = ConfigDict(extra="forbid", strict=True)
    return create_model(spec.class_name, __config__=strict, __module__=__name__, **fields)


def described(method: str, default: object) -> str:
    return f"{method}; required" if default is REQUIRED else f"{method}; default {default!r}"


def spec_of(method: str) -> MethodSpec:
    if method not in catalog():
        raise UsageError(no_such_method(method))
    return catalog()[method]


def checked_hyperparameters(
    method: str, values: Mapping[str, object], run_keys: Collection[str]
) -> tuple[dict[str, object], dict[str, str]]:
    """Return the method's hyperparameters among these values, and the problems by key."""
    model = hyperparameter_model(method)
    unknown = {k for k in values if k not in model.model_fields}
    problems = {key: unknown_key(key, method, run_keys) for key in unknown}
    given = {k: v for k, v in values.items() if k not in unknown}
    _, found = validated(model, given)
    return given, problems | found


def unknown_key(key: str, method: str, run_keys: Collection[str]) -> str:
    """Return the sentence for a key that neither the run nor the method has."""
    others = [name for name, spec in catalog().items() if key in spec.fields]
    known = [*run_keys, *spec_of(method).fields]
    if others:
        return f"{key!r} belongs to the method {' and '.join(others)}, not to {method!r}"
    if SYNONYMS.get(str(key)) in known:
        return f"there is no key {key!r}. Did you mean {SYNONYMS[str(key)]!r}?"
    return f"there is no key {key!r}.{did_you_mean(str(key), known)}"
