"""Where HF PEFT would compute something else from an adapter's folder than Inlay does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from inlay.checkpoint.placement import expert_names, named_by_weight
from inlay.methods.base import Method
from inlay.model.adapters.places import matrices_at
from inlay.model.adapters.registry import Attached
from inlay.model.seams.transformers import renaming
from inlay.storage.base import FrozenLinear
from inlay.storage.convolution import Convolution
from inlay.storage.own import OwnEmbedding, OwnLinear
from inlay.storage.parameters import APART, Parameter
from inlay.storage.reads import READ
from inlay.storage.registry import layer_class


def warn_where_peft_differs(model: nn.Module, attached: Attached, about: str) -> list[str]:
    found = dict[str, str]()
    for place, reason in differences(model, attached):
        found.setdefault(reason, place)
    places = [f"{place}: {reason}" for reason, place in found.items()]
    if places:
        warnings.warn(
            f"{about} is as Inlay computes it, and HF PEFT 0.21 computes otherwise or cannot load "
            f"it. {'; '.join(places)}",
            UserWarning,
            stacklevel=3,
        )
    return places


def differences(model: nn.Module, attached: Attached) -> Iterator[tuple[str, str]]:
    method = attached.method
    if method.peft_type is None:
        return
    lora = method.peft_type == "LORA"
    experts, convert = (expert_names(model), renaming(model)) if lora else ((), None)
    for target in attached.found.names:
        leaf = target.rpartition(".")[2]
        layers_alone = all(at.parameter is None for at in matrices_at(model, target))
        if convert is not None and is_renamed(convert, target) and layers_alone:
            yield (
                target,
                "HF PEFT reads the layer's name as an older checkpoint's and drops it",
            )
        if leaf in experts and not named_by_weight(model, method, target) and layers_alone:
            yield target, f"HF PEFT reads the name {leaf} as the experts', and has no other for it"
        for at in matrices_at(model, target):
            above, _, last = at.name.rpartition(".")
            inside = isinstance(model.get_submodule(above), nn.MultiheadAttention)
            if inside and last == "out_proj" and above not in attached.found.names:
                yield at.place, "HF PEFT cannot adapt an attention module's output projection alone"
            if not inside and is_read(model, at.name):
                yield at.place, "HF PEFT adapts the layer's forward, and the model reads the weight"
            reason = reason_at(method, at.view, model.get_submodule(at.name))
            if reason is not None:
                yield at.place, reason


def is_renamed(convert: Callable[[str], str], name: str) -> bool:
    keys = [f"{prefix}{name}.lora_A.weight" for prefix in ("base_model.model.", "")]
    return any(not key.endswith(convert(key)) for key in keys)


def is_read(model: nn.Module, name: str) -> bool:
    """Return whether code outside a layer's forward was seen to compute with its weight."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return True  # in torch's fused path
    return bool(vars(model.get_submodule(name)).get(READ))


def reason_at(method: Method, view: FrozenLinear, module: nn.Module) -> str | None:
    plain = method.peft_type == "LORA" and not method.peft_fixed
    if isinstance(view, Parameter) and not plain:
        return f"HF PEFT adapts single parameters by LoRA alone, not by {method.name}"
    if isinstance(view, Parameter) and view.parameter in APART:
        return "HF PEFT adapts no attention whose keys and values have other widths"
    if isinstance(view, Convolution):
        return reason_at_convolution(view)
    if isinstance(view, OwnLinear | OwnEmbedding):
        name = layer_class(module).__name__
        if name != "NonDynamicallyQuantizableLinear":
            return (
                f"HF PEFT adds to the output of {name}, whose own forward changes the weight first"
            )
    return None


def reason_at_convolution(view: Convolution) -> str | None:
    layer: Any = view.layer
    if view.groups > 1:
        return "HF PEFT adapts a grouped convolution by values that no kernel of the layer can hold"
    if any(step != 1 for step in layer.dilation):
        return "HF PEFT leaves a convolution's dilation out"
    if layer.padding_mode != "zeros":
        return f"HF PEFT pads with zeros where the layer's padding is {layer.padding_mode}"
    return None
