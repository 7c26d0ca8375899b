"""A model as it will be trained, built from its configuration alone."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from inlay.errors import ModelError, did_you_mean
from inlay.model.load.arguments import checked_dtype, packed_storage
from inlay.model.load.folder import EMBEDDED, looks_like_hub_id
from inlay.model.load.heads import Head, configured
from inlay.model.load.libraries import failures_as_sentences
from inlay.model.load.pretrained import model_class
from inlay.model.load.quantize import dense_view, storages
from inlay.model.seams.transformers import built_empty, no_init_weights
from inlay.model.stream.host import embedding_on_host
from inlay.storage.registry import storage_class


def config_of(model: str, revision: str | None = None) -> tuple[PreTrainedConfig, Path]:
    """`model` is `pocket`, a folder, a config.json or a hub id; no weights are needed."""
    where = EMBEDDED[model] if model in EMBEDDED else Path(model).expanduser().resolve()
    if where.is_file():
        return config_in_file(where), where
    if where.is_dir() and not (where / "config.json").is_file():
        raise ModelError(f"{where} has no config.json, which every model folder has")
    if not where.is_dir() and not looks_like_hub_id(model):
        raise ModelError(f"there is no folder or file {model!r}.{did_you_mean(model, EMBEDDED)}")
    source = str(where) if where.is_dir() else model
    with failures_as_sentences(Path(source), "configuration"):
        return AutoConfig.from_pretrained(source, revision=revision), where


def config_in_file(file: Path) -> PreTrainedConfig:
    with failures_as_sentences(file, "configuration"):
        values = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(values.pop("model_type"), **values)


def skeleton(
    config: PreTrainedConfig,
    storage: str = "dense",
    *,
    double_quant: bool,
    dtype: str,
    head: Head | None = None,
    head_storage: str = "dense",
    embedding_on_device: bool = True,
) -> PreTrainedModel:
    """Build a model without values whose layers are held as `inlay.load` would hold them."""
    config = deepcopy(config)  # a model writes into its own, and the next one is built of the same
    held = packed_storage(getattr(config, "quantization_config", None), "the model") or storage
    vars(config).pop("quantization_config", None)
    with no_init_weights():
        model = empty_model(config, computing_dtype(config, dtype), head)
        model.tie_weights()
    for name, storage in storages(model, held, head_storage).items():
        unfill(model, name, storage, double_quant)
    if not embedding_on_device:
        embedding_on_host(model, "cpu")
    model.requires_grad_(False)
    return model


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype, head: Head | None = None
) -> PreTrainedModel:
    made_as = model_class(config, head)
    if head is not None:
        configured(config, head)
        text: Any = config.get_text_config()
        text.pad_token_id = text.pad_token_id or 0
    if made_as is AutoModelForCausalLM:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    return built_empty(made_as, config, dtype)


def computing_dtype(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    asked = checked_dtype(dtype)
    own: Any = config.dtype if asked == "auto" else asked
    return getattr(torch, own) if isinstance(own, str) else own or torch.float32


def unfill(model: nn.Module, name: str, storage: str, double_quant: bool) -> None:
    view = dense_view(model.get_submodule(name))
    layer = storage_class(storage).unfilled(
        view.shape, view.dtype, view.bias, double_quant=double_quant
    )
    model.set_submodule(name, layer.train(view.layer.training))
