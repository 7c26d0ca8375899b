"""The contestants of the speed measurements: Inlay, and peers as they are commonly set up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import inlay
from benchmarks.lib.turns import KEEPS_MEMORY, SkippedError


@dataclass(frozen=True)
class Contestant:
    """How a contestant builds the base model with the adapter, which a plain loop then trains."""

    name: str
    storage: str
    build: Callable[[str, str], nn.Module]
    """`(base folder, adapter folder)` -> a model that trains that adapter."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    is_ours: bool = False


def ours(base: str, adapter: str, storage: str = "dense") -> nn.Module:
    """Attach to a plain transformers model, as the README does."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    inlay.quantize(model, storage)
    return inlay.load_adapter(model, adapter)


def ours_nf4(base: str, adapter: str) -> nn.Module:
    """The same on NF4 with double quantisation."""
    return ours(base, adapter, "nf4")


def ours_in_8_bits(base: str, adapter: str, storage: str = "dense") -> nn.Module:
    """The same, the frozen products computed in 8 bits."""
    switch: Any = getattr(inlay, "compute_in_8_bits", None)
    if switch is None:
        raise SkippedError("this version of inlay does not compute in 8 bits")
    model = ours(base, adapter, storage)
    switch(model)
    return model


def ours_nf4_in_8_bits(base: str, adapter: str) -> nn.Module:
    """The same, from NF4."""
    return ours_in_8_bits(base, adapter, "nf4")


def peft(base: str, adapter: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """HF peft on a plain transformers model, as its quick tour does."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def peft_in_float32(base: str, adapter: str) -> nn.Module:
    """The same in float32, which some CPUs multiply faster, at twice the memory."""
    return peft(base, adapter, torch.float32)


def peft_bitsandbytes(base: str, adapter: str) -> nn.Module:
    """HF peft on bitsandbytes NF4 with double quantisation, computing in bf16.

    Faster than its documentation's set-up, which also upcasts what is not quantised to fp32 and
    recomputes activations. It must not see an evaluation pass first: on some CPUs that repacks
    the weights for a product that has no gradient.
    """
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    return PeftModel.from_pretrained(model.train(), adapter, is_trainable=True)


CONTESTANTS = {
    (contestant.storage, contestant.name): contestant
    for contestant in (
        Contestant("inlay", "bf16", ours, is_ours=True),
        Contestant("inlay, 8-bit compute", "bf16", ours_in_8_bits, is_ours=True),
        Contestant("peft", "bf16", peft),
        Contestant("peft, allocator set", "bf16", peft, KEEPS_MEMORY),
        Contestant("peft in float32", "bf16", peft_in_float32),
        Contestant("peft in float32, allocator set", "bf16", peft_in_float32, KEEPS_MEMORY),
        Contestant("inlay", "nf4", ours_nf4, is_ours=True),
        Contestant("inlay, 8-bit compute", "nf4", ours_nf4_in_8_bits, is_ours=True),
        Contestant("peft + bitsandbytes", "nf4", peft_bitsandbytes),
        Contestant("peft + bitsandbytes, allocator set", "nf4", peft_bitsandbytes, KEEPS_MEMORY),
    )
}
