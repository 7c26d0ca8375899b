"""Names that HF PEFT takes for a mixture's experts, whatever layer has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from inlay.errors import CheckpointError
from inlay.model.seams.transformers import family_of_experts

RENAMED: dict[str, dict[str, str]] = {
    "mixtral": {
        "gate": "gate.weight",
        "w1": "gate_up_proj",
        "w3": "gate_up_proj",
        "w2": "down_proj",
    },
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
"""Family -> a layer's name -> the parameter that HF PEFT from 0.19 on puts in its place.

It does so for every target that ends in the name, a shared expert's or a dense block's too, and
for LoRA alone.
"""


def renamed(model: nn.Module) -> Mapping[str, str]:
    """Return which names HF PEFT takes for experts on this model; none on most models."""
    return RENAMED.get(family_of_experts(getattr(model, "config", None)) or "", {})


def check_not_renamed(model: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """Raise when a configuration names layers that HF PEFT would look for among the experts.

    Such an adapter was trained before transformers 5 joined a mixture's experts.
    """
    targets = config.get("target_modules")
    if config.get("peft_type") != "LORA" or not isinstance(targets, list):
        return
    old = renamed(model)
    meant = [t for t in targets if isinstance(t, str) and t.rpartition(".")[2] in old]
    if meant:
        raise CheckpointError(
            f"{where} targets {', '.join(sorted(meant))}, which transformers 5 has joined in the "
            f"experts of a {type(model).__name__}: the adapter is of the layout before; load it "
            "once with HF PEFT 0.19 or later on transformers 5, call save_pretrained there, and "
            "read that folder"
        )
