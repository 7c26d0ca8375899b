"""Check what `load` is asked for, and bring it into the form that transformers takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from transformers import PreTrainedConfig

from inlay.errors import ModelError, did_you_mean
from inlay.model.load.hf_quantizer import NAME, InlayQuantizationConfig


def check_word(key: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ModelError(f"{key} must be one of {', '.join(get_args(allowed))}, not {value!r}")


def quantization_for(
    config: PreTrainedConfig,
    model: str,
    storage: str,
    double_quant: bool,
    head_storage: str = "dense",
) -> InlayQuantizationConfig | None:
    """Return how the weights are to be packed while loading; None when they stay as they are.

    A configuration that says bitsandbytes is given our reader instead.
    """
    packed_as = packed_storage(getattr(config, "quantization_config", None), model)
    if packed_as is None:
        if storage == head_storage == "dense":
            return None
        return InlayQuantizationConfig(
            storage=storage, double_quant=double_quant, head_storage=head_storage
        )
    if storage not in ("dense", packed_as):
        raise ModelError(
            f"{model} is held in {packed_as} already, so it cannot be loaded as {storage}; "
            f"load it with storage='{packed_as}' or find the model it was made from"
        )
    config.quantization_config = {
        "quant_method": NAME,
        "storage": packed_as,
        "double_quant": double_quant,
        "head_storage": head_storage,
    }
    return None


def packed_storage(quantization: Mapping[str, Any] | Any, model: str) -> str | None:
    if quantization is None:
        return None
    settings = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    if settings.get("load_in_8bit"):
        return "int8"
    four_bit = settings.get("bnb_4bit_quant_type", "fp4") if settings.get("load_in_4bit") else None
    if four_bit == "nf4":
        return "nf4"
    kind = four_bit or settings.get("quant_method") or "an unnamed method"
    raise ModelError(
        f"{model} is quantised with {kind}; of quantised models, those in bitsandbytes' nf4 "
        "and int8 can be loaded. Load the model it was made from, with storage='nf4'"
    )


def checked_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    names = ("bfloat16", "float16", "float32", "float64")
    if dtype == "auto" or dtype in {getattr(torch, n) for n in names}:
        return dtype
    if dtype in names:
        return getattr(torch, str(dtype))
    raise ModelError(
        f"dtype must be 'auto', {', '.join(names)}, not {dtype!r}.{did_you_mean(str(dtype), names)}"
    )


def checked_device(device: str | torch.device | None) -> torch.device:
    """Return the device asked for, by default the first GPU; raise if it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"there is no device {device!r}; 'cpu' and 'cuda:0' are two") from error
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {str(asked)!r} was asked for, but this machine has "
            f"{torch.cuda.device_count()} CUDA devices that PyTorch can use"
        )
    return asked
