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

from inlay.checkpoint.embeddings import replaced_rows
from inlay.checkpoint.fingerprint import describe_base
from inlay.checkpoint.folder import FORMAT, TENSORS
from inlay.checkpoint.peft_options import COMMON, DEFAULTS
from inlay.checkpoint.placement import (
    exact_targets,
    named_by_weight,
    peft_placement,
    place_names,
    saved_roots,
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
    """Return the arguments of `attach` for the same places, on this or a larger model."""
    saved, tokens = saved_roots(model, attached), attached.trainable_tokens
    if isinstance(attached.method, SelectMethod):
        return Placement(attached.targets, attached.exclude, attached.layers, saved, tokens)
    if isinstance(attached.method, PromptMethod):
        return Placement(modules_to_save=saved, trainable_tokens=tokens)
    targets = exact_targets(attached.found.names, place_names(model))
    return Placement(targets, modules_to_save=saved, trainable_tokens=tokens)


def adapter_config(model: nn.Module, attached: Attached, base: str | None) -> dict[str, Any]:
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
    by_weight = {n for n in names if named_by_weight(model, method, n)}
    patterned = with_patterns(config, method, names, by_weight)
    return json.loads(json.dumps(patterned, sort_keys=True))


def tokens_config(model: nn.Module, attached: Attached) -> dict[str, Any]:
    """HF PEFT has no place for tokens with other methods than LoRA and must not read these."""
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
    """Name every layer in patterns that HF PEFT, which sorts them, would read otherwise."""
    patterns = {p: f for f, p in method.peft_keys.items() if p.endswith("_pattern")}
    ordered = {p: dict(sorted(config[p].items())) for p in patterns}
    as_read = type(method).from_peft({**config, **ordered})
    peft_names = {n: f"{n}.weight" if n in by_weight else n for n in names}
    key = method.peft_keys.get("dropout")
    dropout = {} if key is None else {"dropout": config.get(key)}  # Written as 0.0 for a parameter.
    at = {n: replaced(method.for_layer(n), **dropout) for n in names}
    if all(as_read.for_layer(peft_names[n]) == at[n] for n in names):
        return config
    fields = {p: f.removesuffix("_pattern") for p, f in patterns.items()}
    keys = {n: rf"{re.escape(n)}(\.weight)?" if n in by_weight else n for n in names}
    exact = {
        p: {keys[n]: getattr(method.for_layer(n), f) for n in names} for p, f in fields.items()
    }
    return {**config, **exact}


def adapter_extras(
    model: nn.Module,
    attached: Attached,
    base: str | None,
    folder: Path,
    written: Mapping[str, object],
) -> dict[str, Any]:
    """Return the contents of inlay.json; `written` has the keys of whole embeddings."""
    head = head_of(model)  # One in place of the language model's.
    placement = dataclasses.asdict(placement_of(model, attached))
    if not placement["trainable_tokens"]:
        del placement["trainable_tokens"]
    return {
        "format": FORMAT,
        "inlay": version("inlay"),
        "method": attached.method.name,
        "hyperparameters": hyperparameters(attached.method),
        "placement": placement,
        "modules": list(attached.found.names),
        **({} if head is None else {"head": head.described()}),
        "base": describe_base(model, base, replaced_by(model, attached.name, written)),
        "files": {TENSORS: sha256_of(folder / TENSORS)},
    }


def hyperparameters(method: Method) -> dict[str, Any]:
    return {
        f.name: dict(v) if isinstance(v := getattr(method, f.name), Mapping) else v
        for f in dataclasses.fields(method)
    }


def task_type(model: nn.Module, saved: Sequence[str]) -> str | None:
    """Name a classifying task only with a saved head: HF PEFT trains a new one for these."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    heads = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    return next((t for end, t in heads.items() if name.endswith(end) and saved), None)


def replaced_by(
    model: nn.Module, name: str, keys: Mapping[str, object]
) -> dict[str, set[int] | None]:
    """Return the base's parameters that an adapter replaces: whole (None), or these rows."""
    found = replaced_rows(model, name, keys)
    for place, params in adapter_places(model, name):
        module, single = module_at(model, place)
        for parameter in module._parameters if single is None else ():
            if parameter in params._parameters:
                found[f"{place}.{parameter}"] = None
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
    if method.peft_type is None:
        return ""
    rows = "\n".join(f"- {each}" for each in differs)
    return f"\nHF PEFT 0.21 computes otherwise or cannot load it:\n\n{rows}\n" if rows else PEFT
