"""A tiny random model of any class in transformers' mappings."""

from __future__ import annotations

import copy
from typing import Any

import tiny
import torch
import transformers
import transformers.models.auto.modeling_auto as auto
from repairs import OF_CLASS
from transformers import PreTrainedConfig, PreTrainedModel

MAPPINGS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM",
    "SPEECH_SEQ_2_SEQ", "CTC", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION",
)  # fmt: skip
"""The mappings whose classes are tried, the widest use first."""

LARGEST = 8_000_000
"""Parameters of the largest model that still counts as tiny."""


def families() -> dict[str, tuple[str, str]]:
    """Return every class with its model type and the first mapping that names it."""
    found: dict[str, tuple[str, str]] = {}
    for mapping in MAPPINGS:
        names: dict[str, Any] = getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        for model_type, classes in names.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                found.setdefault(name, (model_type, mapping))
    return found


def built(model_type: str, class_name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a random model of a class, whose weights are large enough to tell values apart."""
    cls = getattr(transformers, class_name)
    config = own(cls, tiny.tiny(model_type, **OF_CLASS.get(class_name, {}), **changes))
    with torch.device("meta"):
        size = sum(p.numel() for p in cls._from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"a shrunken {class_name} still has {size:,} parameters")
    torch.manual_seed(seed)
    model = cls._from_config(config, attn_implementation=None)
    return spread(model, seed).eval()


def own(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a configuration that a class is made from."""
    wanted = cls.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [getattr(config, name) for name in config.sub_configs]
    return next((part for part in parts if isinstance(part, wanted)), config)


@torch.no_grad()
def spread(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Give every matrix values of which a layer's outputs are about as large as its inputs."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() >= 2 and p.is_floating_point():
            fan = max(1, p.shape[-1] if p.dim() == 3 else p.numel() // max(1, p.shape[0]))
            p.copy_(torch.randn(p.shape, generator=g) * (0.7 / fan**0.5))
    return model
