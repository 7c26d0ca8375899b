"""Inputs for any class: text, images as pixels, sounds as waves or mel features, and labels."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

FIRST, LAST = 4, 90
"""Between these ids no token is special."""
ROWS, LONG, SHORT = 2, 12, 7
"""Two rows of text; the shorter one is padded to the longer."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(rows: int = ROWS, length: int = LONG, seed: int = 3) -> Tensor:
    return torch.randint(FIRST, LAST, (rows, length), generator=seeded(seed))


def accepts(model: PreTrainedModel) -> set[str]:
    """Return the names that a model's forward takes."""
    return set(inspect.signature(type(model).forward).parameters)


def needs(model: PreTrainedModel) -> set[str]:
    """Return the names that a model's forward cannot do without."""
    given = inspect.signature(type(model).forward).parameters.values()
    return {p.name for p in given if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def batch(model: PreTrainedModel, mapping: str) -> dict[str, Tensor]:
    """Return a batch that this model can be run and trained on."""
    main, taken = model.main_input_name, accepts(model)
    if "input_ids" in taken and (mapping in READ or main == "input_ids"):
        found = {"input_ids": written(model, mapping)}
        if "bbox" in taken:
            found["bbox"] = boxes(model)
        if "pixel_values" in needs(model):
            found["pixel_values"] = pixels(model)
    elif main == "pixel_values":
        found = {"pixel_values": pixels(model)}
    elif main in ("input_features", "input_values"):
        found = {main: sound(model, main)}
    else:
        raise ValueError(f"no inputs are known for {main!r}")
    return found | ({"labels": labels(model, mapping, found)} if "labels" in taken else {})


READ = ("CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT")
"""Mappings of classes that read text and say something at each token."""


def written(model: PreTrainedModel, mapping: str) -> Tensor:
    """Return rows of text; those that a decoder classifies end with its end token."""
    ids = words()
    if mapping == "SEQUENCE_CLASSIFICATION" and model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id
    return ids


def boxes(model: PreTrainedModel) -> Tensor:
    """Return where each word stands on its page."""
    corners = torch.tensor([[10, 20, 30, 40]]).repeat(ROWS, LONG, 1)
    return corners / 100 if model.config.model_type == "bros" else corners


def labels(model: PreTrainedModel, mapping: str, given: dict[str, Tensor]) -> Tensor:
    """Return what the loss is taken against."""
    config: Any = model.config
    if mapping == "TOKEN_CLASSIFICATION":
        return given["input_ids"] % config.num_labels
    if mapping.endswith("_CLASSIFICATION"):
        return torch.tensor([0, 1])
    if mapping in READ or (not config.is_encoder_decoder and "input_ids" in given):
        return given["input_ids"].clone()
    return words(ROWS, LONG if config.model_type == "fsmt" else SHORT, 5)


def pixels(model: PreTrainedModel) -> Tensor:
    """Return random images of the size and channels that the configuration says."""
    config: Any = getattr(model.config, "vision_config", None) or model.config
    size = getattr(config, "image_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", None) or 3
    return torch.randn(ROWS, channels, height, width, generator=seeded(1))


BINS = ("feature_projection_input_dim", "num_mel_bins", "n_mel_bins", "input_feat_per_channel")


def sound(model: PreTrainedModel, name: str) -> Tensor:
    """Return a wave, or as many mel features as the encoder has positions for."""
    config: Any = model.config
    if name == "input_values" and config.model_type != "audio-spectrogram-transformer":
        return torch.randn(ROWS, 4000, generator=seeded(1))
    parts = [config, *(getattr(config, part) for part in config.sub_configs)]
    bins = next((getattr(p, n) for n in BINS for p in parts if getattr(p, n, None)), 16)
    if config.model_type == "audio-spectrogram-transformer":
        return torch.randn(ROWS, config.max_length, bins, generator=seeded(1))
    if config.model_type == "whisper":
        return torch.randn(ROWS, bins, 2 * config.max_source_positions, generator=seeded(1))
    return torch.randn(ROWS, 64, bins, generator=seeded(1))
