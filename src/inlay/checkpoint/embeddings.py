"""Embeddings and heads in an adapter's file: those of a base whose vocabulary was changed.

A base that got new tokens is in no checkpoint, so an adapter made on it brings these matrices, as
HF PEFT's `save_embedding_layers` does. Read back, the rows unlike the base's belong to the adapter:
they act while it does, and the base stays what it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from inlay.errors import ModelError
from inlay.methods.params import Params
from inlay.methods.tokens import ROWS, give_tokens, tokens_of
from inlay.model.adapters.attach import put
from inlay.model.adapters.create import Place
from inlay.model.adapters.layer import AdaptedLayer
from inlay.model.adapters.registry import Attached, activate, adapter_places, required_registry
from inlay.model.adapters.targets import output_head
from inlay.model.adapters.tokens import (
    input_embeddings,
    is_embedding,
    name_of,
    row_count,
    rows_of,
    tied_to,
)
from inlay.model.load.folder import EMBEDDED, looks_like_hub_id
from inlay.storage.registry import frozen, matrix_kind

PREFIX = "base_model.model."
WRAPPERS = ("token_adapter.base_layer.", "base_layer.", "original_module.", "modules_to_save.", "")
"""The prefixes of a weight's key in a module, by HF PEFT's wrapper around the module."""


def ends_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the input embedding and the output head by name, a tied head too."""
    ends = (input_embeddings(model), output_head(model))
    held = [module for module in ends if module is not None and matrix_kind(module)]
    return {name: module for module in held if (name := name_of(model, module))}


def resized_from(model: nn.Module) -> int | None:
    """Return the size before the vocabulary was changed; None where nothing shows a change."""
    config: Any = getattr(model, "config", None)
    embedding = input_embeddings(model)
    if not isinstance(config, PreTrainedConfig) or embedding is None:
        return None
    now = getattr(config.get_text_config(), "vocab_size", None)
    parts = (name_of(model, embedding) or "").split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    sizes = [vars(module).get("vocab_size") for module in around]
    sizes.append(stored_size(config, getattr(model, "name_or_path", "")))
    other = [size for size in sizes if isinstance(size, int) and size != now]
    return min(other) if other and isinstance(now, int) else None


def stored_size(config: PreTrainedConfig, path: str) -> int | None:
    folder = EMBEDDED.get(path, path)
    if not path or not (Path(folder).is_dir() or looks_like_hub_id(path)):
        return None
    try:
        found = type(config).from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ModelError):
        return None
    return getattr(found.get_text_config(), "vocab_size", None)


def saved_embeddings(model: nn.Module, attached: Attached, asked: bool | None) -> dict[str, Tensor]:
    """`asked` None: where the vocabulary was changed, or the adapter has rows of its own."""
    before = resized_from(model)
    here = dict(adapter_places(model, attached.name))
    kept = any(tokens_of(p, "kept_rows") for p in here.values())
    if asked is False or not (asked or kept or before is not None):
        return {}
    found: dict[str, Tensor] = {}
    if asked and not ends_of(model):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers "
            f"model. No embedding is saved of this {type(model).__name__}, which does not say "
            "which it is (get_input_embeddings)",
            stacklevel=2,
        )
    for name, module in ends_of(model).items():
        params = here.get(name)
        shared = set(tied_to(model, name)) & set(map(module_of, found))
        covered = params is not None and not asked and covers(params, module, before)
        copied = params is not None and "weight" in params._parameters
        if not shared and not copied and not covered:
            home = wrapper_prefix(name, attached, params)
            found[f"{PREFIX}{name}.{home}weight"] = whole_matrix(module, params)
    return found


def module_of(key: str) -> str:
    """Return the module whose weight a key is, without HF PEFT's wrappers; "" for another key."""
    name = key.removeprefix(PREFIX)
    endings = (f".{home}weight" for home in WRAPPERS)
    return next((name.removesuffix(end) for end in endings if name.endswith(end)), "")


def wrapper_prefix(name: str, attached: Attached, params: Params | None) -> str:
    """Return what stands between a module's name and `weight` in HF PEFT's key."""
    if name in attached.found.names:
        return "base_layer."
    trains = params is not None and bool(tokens_of(params, "token_rows"))
    return "token_adapter.base_layer." if trains else ""


def covers(params: Params, module: nn.Module, before: int | None) -> bool:
    """Return whether an adapter trains every row that a changed vocabulary has added."""
    if before is None or tokens_of(params, "kept_rows"):
        return False
    return set(range(before, row_count(module))) <= set(tokens_of(params, "token_rows"))


@torch.no_grad()
def whole_matrix(module: nn.Module, params: Params | None) -> Tensor:
    matrix = frozen(module)
    rows = matrix.dequantize()
    rows = (rows.T if is_embedding(matrix) else rows).clone()
    if params is not None and tokens_of(params, "kept_rows"):
        ids = torch.tensor(tokens_of(params, "kept_rows"), device=rows.device)
        rows[ids] = params.kept_rows.to(rows.dtype)
    return rows


@torch.no_grad()
def keep_embeddings(model: nn.Module, name: str, values: Mapping[str, Tensor]) -> None:
    """Give an adapter the rows of whole matrices, by module, that differ from the base's own."""
    copied = {n for n, p in adapter_places(model, name) if "weight" in p._parameters}
    for module_name, value in values.items():
        module = model.get_submodule(module_name)
        everywhere = rows_of(module, range(row_count(module)))
        given = value.to(everywhere)
        ids = (given != everywhere).any(1).nonzero().squeeze(1)
        if not len(ids):
            continue
        kept = value.to(frozen(module).device)[ids].to(frozen(module).dtype)
        tied = [n for n in tied_to(model, module_name) if n not in values and n not in copied]
        for each in (module_name, *tied):
            layer = model.get_submodule(each)
            if not (isinstance(layer, AdaptedLayer) and name in layer.adapters):
                put(layer, Place(None, Params({})), name)
            assert isinstance(layer, AdaptedLayer)
            layer.params(name).register_buffer("kept_rows", kept)
            give_tokens(layer.params(name), "kept_rows", ids.tolist())
    registry = required_registry(model)
    activate(model, registry, registry.active)


def replaced_rows(
    model: nn.Module, name: str, keys: Mapping[str, object]
) -> dict[str, set[int] | None]:
    """Return the weights that the file replaces: these tokens' rows, or all (None)."""
    found: dict[str, set[int] | None] = {}
    for place, params in adapter_places(model, name):
        for rows in ROWS:
            if tokens_of(params, rows):
                weight = f"{place}.weight"
                found[weight] = (found.get(weight) or set()) | set(tokens_of(params, rows))
    copied = {n for n, p in adapter_places(model, name) if "weight" in p._parameters}
    for end in ends_of(model).keys() - copied:
        if any(module_of(key) == end for key in keys):
            found |= {f"{each}.weight": None for each in (end, *tied_to(model, end))}
    return found
