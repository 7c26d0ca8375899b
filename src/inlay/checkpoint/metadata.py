"""What adapter_config.json, inlay.json and the model card say of an adapter."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from torch import nn

from inlay.checkpoint.embeddings import brought
from inlay.checkpoint.fingerprint import describe_base
from inlay.checkpoint.folder import FORMAT, TENSORS
from inlay.checkpoint.peft_options import COMMON, DEFAULTS
from inlay.checkpoint.placement import (
    peft_placement,
    place_names,
    saved_roots,
    suffixes,
    told_by_weight,
)
from inlay.files import sha256_of
from inlay.methods.base import Method, PromptMethod, SelectMethod, replaced
from inlay.model.adapters.places import module_at, view_at
from inlay.model.adapters.registry import Attached, adapter_places
from inlay.model.adapters.tokens import input_name
from inlay.model.load.heads import head_of


@dataclass(frozen=True)
class Placement:
    """`attach`'s arguments as inlay.json records them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    targets: str | tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    layers: str | tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    trainable_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def placement_of(model: nn.Module, attached: Attached) -> Placement:
    """Return what to ask `attach` for to get the same places again, on this or a larger model."""
    saved, tokens = saved_roots(model, attached), attached.trainable_tokens
    if isinstance(attached.method, SelectMethod):
        return Placement(attached.targets, attached.exclude, attached.layers, saved, tokens)
    if isinstance(attached.method, PromptMethod):
        return Placement(modules_to_save=saved, trainable_tokens=tokens)
    exact = suffixes(attached.found.names, place_names(model))
    return Placement(
        exact if isinstance(exact, str) else tuple(exact),
        modules_to_save=saved,
        trainable_tokens=tokens,
    )


def config_of(model: nn.Module, attached: Attached, base: str | None) -> dict[str, Any]:
    """Return the contents of adapter_config.json."""
    method = attached.method
    saved = saved_roots(model, attached)
    options = hyperparameters(method) if method.peft_type is None else method.to_peft()
    config = {
        **COMMON,
        **DEFAULTS.get(method.peft_type or "", {}),
        **options,
        **peft_placement(model, method, attached.found.names, saved),
        "base_model_name_or_path": base,
        "peft_type": method.peft_type or f"INLAY_{method.name.upper()}",
        "task_type": task_type(model, saved),
    }
    if attached.trainable_tokens:
        config |= tokens_config(model, attached)
    if "fan_in_fan_out" in config:
        views = (view_at(model, name) for name in attached.found.names)
        config["fan_in_fan_out"] = any(v is not None and v.stands_for == "conv1d" for v in views)
    if config.get("target_parameters"):
        config["lora_dropout"] = 0.0  # HF PEFT refuses another; a trained adapter has none
    names = attached.found.names
    by_weight = {n for n in names if told_by_weight(model, method, n)}
    patterned = with_patterns(config, method, names, by_weight)
    return json.loads(json.dumps(patterned, sort_keys=True))


def tokens_config(model: nn.Module, attached: Attached) -> dict[str, Any]:
    """Return what the configuration says of tokens whose rows train.

    HF PEFT has no place for them beside other methods than LoRA, so it is not to read these.
    """
    tokens = {name: list(ids) for name, ids in attached.trainable_tokens.items()}
    only = list(tokens) == [input_name(model)]
    found: dict[str, Any] = {
        "trainable_token_indices": next(iter(tokens.values())) if only else tokens
    }
    if attached.method.peft_type != "LORA":
        found["peft_type"] = f"INLAY_{attached.method.name.upper()}"
    return found


def with_patterns(
    config: dict[str, Any], method: Method, names: Sequence[str], by_weight: Collection[str] = ()
) -> dict[str, Any]:
    """Spell out the patterns by layer where HF PEFT, which sorts them, would read them otherwise.

    The first pattern that matches counts, in either library. HF PEFT knows the layers in
    `by_weight` by the name of their weight.
    """
    patterns = {p: f for f, p in method.peft_keys.items() if p.endswith("_pattern")}
    ordered = {p: dict(sorted(config[p].items())) for p in patterns}
    as_read = type(method).from_peft({**config, **ordered})
    told = {n: f"{n}.weight" if n in by_weight else n for n in names}
    at = {n: replaced(method.for_layer(n), **unread(method, config)) for n in names}
    if all(as_read.for_layer(told[n]) == at[n] for n in names):
        return config
    fields = {p: f.removesuffix("_pattern") for p, f in patterns.items()}
    keys = {n: rf"{re.escape(n)}(\.weight)?" if n in by_weight else n for n in names}
    exact = {
        p: {keys[n]: getattr(method.for_layer(n), f) for n in names} for p, f in fields.items()
    }
    return {**config, **exact}


def unread(method: Method, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the configuration leaves at another value than the method's."""
    dropped = "dropout" in method.peft_keys and config.get(method.peft_keys["dropout"])
    return {"dropout": dropped} if "dropout" in method.peft_keys else {}


def extras_of(
    model: nn.Module,
    attached: Attached,
    base: str | None,
    folder: Path,
    written: Mapping[str, object],
) -> dict[str, Any]:
    """Return the contents of inlay.json, once the tensors are written.

    `written` has the keys of whole embeddings beside the adapter's own tensors.
    """
    return {
        "format": FORMAT,
        "inlay": version("inlay"),
        "method": attached.method.name,
        "hyperparameters": hyperparameters(attached.method),
        "placement": recorded_placement(placement_of(model, attached)),
        "modules": list(attached.found.names),
        **head_record(model),
        "base": describe_base(model, base, replaced_by(model, attached.name, written)),
        "files": {TENSORS: sha256_of(folder / TENSORS)},
    }


def head_record(model: nn.Module) -> dict[str, Any]:
    """Return what inlay.json says of a head in place of the language model's; nothing if none."""
    head = head_of(model)
    return {} if head is None else {"head": head.described()}


def hyperparameters(method: Method) -> dict[str, Any]:
    """Return a method's fields as JSON values."""
    return {
        f.name: dict(v) if isinstance(v := getattr(method, f.name), Mapping) else v
        for f in dataclasses.fields(method)
    }


def task_type(model: nn.Module, saved: Sequence[str]) -> str | None:
    """Return HF PEFT's word for what the model does.

    HF PEFT trains a new head for the classifying tasks, so they are named only where the adapter
    brings one.
    """
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    heads = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    return next((t for end, t in heads.items() if name.endswith(end) and saved), None)


def trained_names(model: nn.Module, name: str) -> set[str]:
    """Return the names of the base's parameters that an adapter has its own copies of."""
    return {
        f"{module_name}.{parameter}"
        for module_name, params in adapter_places(model, name)
        for parameter in own_names(model, module_name)
        if parameter in params._parameters
    }


def own_names(model: nn.Module, place: str) -> Sequence[str]:
    """Return the names of the parameters that a module holds; none for a single parameter."""
    module, parameter = module_at(model, place)
    return () if parameter is not None else tuple(module._parameters)


def replaced_by(
    model: nn.Module, name: str, keys: Mapping[str, object]
) -> dict[str, set[int] | None]:
    """Return the base's parameters whose values an adapter brings: whole ones, or these rows.

    `keys` are those of the adapter's file.
    """
    return {**brought(model, name, keys), **dict.fromkeys(trained_names(model, name))}


def recorded_placement(placement: Placement) -> dict[str, Any]:
    """Return a placement as inlay.json has it; tokens are named only where some train."""
    found = dataclasses.asdict(placement)
    if not placement.trainable_tokens:
        del found["trainable_tokens"]
    return found


TEXT = """\
---
{front}
---

# {title}

An adapter made with inlay: {method}, {count:,} trained values.
It needs its base model, {base}.

| hyperparameter | value |
|---|---|
{rows}

```python
import inlay

model, tokenizer = inlay.load({base_code})
inlay.load_adapter(model, "path/to/this/folder")
```
{peft}"""


PEFT = """
HF PEFT reads it too: `PeftModel.from_pretrained(model, "path/to/this/folder")`.
"""


def card(
    method: Method,
    hyperparameters: Mapping[str, object],
    base: str | None,
    count: int,
    differs: Sequence[str] = (),
) -> str:
    """Return the text of an adapter's README.md."""
    kind = [method.peft_type.lower()] if method.peft_type else []
    tags = dict.fromkeys(["inlay", method.name, *kind])
    front = [f"base_model: {json.dumps(base)}"] if base else []
    front += ["library_name: peft", "tags:", *(f"- {tag}" for tag in tags)]
    rows = [f"| {key} | `{json.dumps(value)}` |" for key, value in hyperparameters.items()]
    return TEXT.format(
        front="\n".join(front),
        title=f"{method.name} adapter" + (f" for {base}" if base else ""),
        method=method.name,
        count=count,
        base=f"`{base}`" if base else "which this folder does not name",
        rows="\n".join(rows),
        base_code=json.dumps(base or "the base model"),
        peft=peft_text(method, differs),
    )


def peft_text(method: Method, differs: Sequence[str]) -> str:
    """Return what the card says of HF PEFT."""
    if method.peft_type is None:
        return ""
    rows = "\n".join(f"- {each}" for each in differs)
    return f"\nHF PEFT 0.21 computes otherwise or cannot load it:\n\n{rows}\n" if rows else PEFT
